"""What a stage trains and on what: cache, samples and student's checkpoint, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.errors import CacheError, ConfigError
from storage.identity import stored_relation
from storage.reader import Cache, first_sample_with_images, read_identity
from student_train.batch import check_grid
from student_train.config import LossesSection, StageSection
from student_train.loader import SampleTable, select
from student_train.models import Checkpoint, check_fit, read_checkpoint
from student_train.sparse_upcycling import is_sparse


@dataclass(frozen=True, eq=False)
class Material:
    """All that a stage needs but weights. The student fits the cache."""

    cache: Cache
    table: SampleTable
    checkpoint: Checkpoint
    images: str | None  # folder; None: the one that the cache names, or the cache itself

    @property
    def centered(self) -> bool:
        """Whether the cache's relation matrices are centered."""
        return stored_relation(self.cache.identity).centered

    @property
    def relation_pool(self) -> int | None:
        """Side of the blocks of the visual grid that the cache's relation matrices are averaged over."""
        return stored_relation(self.cache.identity).pool


def prepare(stage: StageSection, cache_path: str) -> Material:
    """Open and check everything. Errors: ConfigError, CacheError, IdentityError, StillhouseError."""
    checkpoint = fitting_checkpoint(stage, cache_path)
    cache = open_sealed(cache_path, loss_families(stage.losses), max_bytes=(stage.memory_mb << 20) // 2)
    _check_treatments(stage.losses, cache.identity.selection)
    if stage.losses.balance and stage.moe is None and not is_sparse(checkpoint.config):
        raise ConfigError(
            f"losses.balance is for routers, and {checkpoint.folder} has none; give the stage `moe`, or leave it out"
        )
    indices = chosen_samples(cache, stage.splits)
    if stage.losses.preference:
        indices = chosen_pairs(cache, indices)
    rows, images = cache.num_response_rows[indices].astype(np.int64), cache.num_images[indices].astype(np.int64)
    table = SampleTable(
        indices=indices,
        num_response_rows=rows if rows.ndim == 1 else rows.sum(1),
        num_images=images if images.ndim == 1 else images.sum(1),
        tokens_per_image=checkpoint.grid.tokens_per_image,
        order=cache.shuffle(indices if indices.ndim == 1 else indices[:, 0], window_rows=stage.shuffle_rows),
    )
    return Material(cache, table, checkpoint, stage.images)


def fitting_checkpoint(stage: StageSection, cache_path: str) -> Checkpoint:
    """The student's checkpoint, if it fits the cache. Takes well under a second, whatever the size of the cache.

    Neither weights nor the cache's index are read: cache.json, and one sample for the losses that need its
    visual grid. Errors: IdentityError naming field, both values and what to do; those of `read_checkpoint`.
    """
    identity = read_identity(cache_path)
    checkpoint = read_checkpoint(stage.init)
    check_fit(checkpoint, identity)
    if stage.losses.visual or stage.losses.relation:
        example = first_sample_with_images(cache_path, stage.splits)
        if example is not None:
            check_grid(example, checkpoint.grid)
    return checkpoint


def open_sealed(path: str, families: tuple[str, ...], *, max_bytes: int) -> Cache:
    """A cache whose dump has finished, to be read with so much memory. Errors: CacheError."""
    cache = Cache.open(path, families, max_bytes=max_bytes)
    if not cache.sealed:
        raise CacheError(f"{path}: its dump has not finished (there is no manifest.json); run the dump to its end")
    return cache


def chosen_samples(cache: Cache, splits: tuple[str, ...]) -> np.ndarray:
    """Indices of the samples of some splits, one or more. ConfigError if there are none."""
    indices = select(cache.splits, splits)
    if not len(indices):
        raise ConfigError(
            f"{cache.folder}: no sample is in the splits {', '.join(splits) or '(none)'}; "
            f"the cache has {', '.join(sorted(set(cache.splits))) or 'no samples'}"
        )
    return indices


def chosen_pairs(cache: Cache, indices: np.ndarray) -> np.ndarray:
    """(p, 2) chosen and rejected of every preference pair among some samples, one or more. ConfigError if none is."""
    wanted = set(indices.tolist())
    pairs = [(pair.chosen, pair.rejected) for pair in cache.pairs()]
    found = [pair for pair in pairs if wanted.issuperset(pair)]
    if not found:
        raise ConfigError(
            f"{cache.folder}: losses.preference trains on pairs, and none of the {len(indices)} samples is half of "
            "one; dump preference pairs with the family sequence, or give stages.NAME.splits theirs"
        )
    return np.array(found, np.int64)


def loss_families(losses: LossesSection) -> tuple[str, ...]:
    """The families of the cache that these losses read, besides the tokens."""
    families = tuple(family for family in ("response", "visual", "relation") if getattr(losses, family))
    return (*families, "sequence") if losses.preference else families


def _check_treatments(losses: LossesSection, selection: Mapping[str, Any]) -> None:
    for family in ("response", "visual"):
        section = getattr(losses, family)
        if section is None:
            continue
        method = selection.get(family, {}).get("method")
        if section.treatment == "unbiased" and method not in ("threshold", "sampled"):
            raise ConfigError(
                f"losses.{family}.treatment is 'unbiased', but the cache's {family} rows were selected by "
                f"{method!r}, which keeps nothing of the tail; use 'bucket', or dump with method 'threshold'"
            )
        if section.treatment == "bucket" and method == "sampled":
            raise ConfigError(
                f"losses.{family}.treatment is 'bucket', but the cache's {family} rows were selected by 'sampled', "
                "which keeps no entry exactly: all would be in the bucket; use 'unbiased'"
            )
