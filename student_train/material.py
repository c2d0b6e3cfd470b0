"""What a stage trains and on what: cache, samples and student's checkpoint, checked against each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from storage.errors import CacheError, ConfigError
from storage.identity import Identity, stored_relation, stored_temperatures
from storage.narrowing import Narrowing
from storage.reader import Cache, first_sample_with_images, read_identity
from student_train.batch import check_grid
from student_train.config import LossesSection, StageSection
from student_train.fused_head import TeacherHead
from student_train.loader import SampleTable, select
from student_train.models import Checkpoint, check_fit, read_checkpoint
from student_train.objective import CachedTeacher
from student_train.sparse_upcycling import is_sparse


@dataclass(frozen=True, eq=False)
class Material:
    """All that a stage needs but weights. The student fits the cache."""

    cache: Cache
    table: SampleTable
    checkpoint: Checkpoint
    images: str | None  # folder; None: the one that the cache names, or the cache itself


def prepare(stage: StageSection, cache_path: str) -> Material:
    """Open and check everything. Errors: ConfigError, CacheError, IdentityError, StillhouseError."""
    checkpoint = fitting_checkpoint(stage, cache_path)
    families = loss_families(stage.losses)
    cache = open_sealed(cache_path, families, max_bytes=(stage.memory_mb << 20) // 2, narrowing=narrowing(stage.losses))
    check_losses(stage.losses, cache.identity, cache.families, place="losses")
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
        tokens_per_image=checkpoint.grid.num_teacher_tokens,
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
            grid = replace(checkpoint.grid, teacher_tokens_per_image=example.images[0].num_visual_tokens)
            check_grid(example, grid)
            checkpoint = replace(checkpoint, grid=grid)
    return checkpoint


def cached_teacher(material: Material, losses: LossesSection) -> CachedTeacher:
    """What these losses need of the cache besides its rows; reads profiles and the head. Errors: CacheError."""
    cache, relation = material.cache, stored_relation(material.cache.identity)
    sections = {name: section for name in ("response", "visual") if (section := getattr(losses, name))}
    return CachedTeacher(
        tokens_per_image=material.checkpoint.grid.num_teacher_tokens,
        centered=relation.centered,
        pool=relation.pool,
        temperatures={name: stored_temperatures(cache.identity, name) for name in sections},
        profiles={
            name: torch.from_numpy(cache.tail_profile(name))
            for name, section in sections.items()
            if section.treatment == "profile"
        },
        head=_teacher_head(cache) if any(each.treatment == "exact" for each in sections.values()) else None,
    )


def _teacher_head(cache: Cache) -> TeacherHead:
    head = cache.head()
    weight = torch.from_numpy(head.weight.copy())  # the reader's is a view of bytes that must not be written to
    if head.weight.dtype == np.uint16:
        weight = weight.view(torch.bfloat16)
    bias = None if head.bias is None else torch.from_numpy(head.bias.copy())
    return TeacherHead(weight, bias, head.scale, head.soft_cap)


def narrowing(losses: LossesSection) -> dict[str, Narrowing]:
    """What is read of a family's rows, where that is less than is stored."""
    sections = {"response": losses.response, "visual": losses.visual}
    asked = {family: Narrowing.of(k=each.k, tau=each.tau) for family, each in sections.items() if each}
    return {family: each for family, each in asked.items() if each}


def open_sealed(
    path: str, families: tuple[str, ...], *, max_bytes: int, narrowing: Mapping[str, Narrowing] | None = None
) -> Cache:
    """A cache whose dump has finished, to be read with so much memory. Errors: CacheError."""
    cache = Cache.open(path, families, max_bytes=max_bytes, narrowing=narrowing)
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
    families = [family for family in ("response", "visual", "relation") if getattr(losses, family)]
    if losses.response and losses.response.treatment == "exact":
        families[0] = "hidden"
    return (*families, "sequence") if losses.preference else tuple(families)


def check_losses(losses: LossesSection, identity: Identity, held: Collection[str], *, place: str) -> None:
    """ConfigError for losses that a cache of these families, made or still to come, cannot serve."""
    for family in loss_families(losses):
        if family not in held:
            raise ConfigError(f"{place}: these losses read {family}, which is not dumped; add it to cache.families")
    for family in ("response", "visual"):
        section = getattr(losses, family)
        if section is None or section.treatment == "exact":
            continue
        asked = Narrowing.of(k=section.k, tau=section.tau)
        if asked:
            asked.check(identity.selection.get(family, {}), f"{place}.{family}")
        method = identity.selection.get(family, {}).get("method")
        given = f"{place}.{family}.treatment is {section.treatment!r}, but the cache's {family} rows were selected by "
        if section.treatment == "unbiased" and method not in ("threshold", "sampled"):
            raise ConfigError(
                f"{given}{method!r}, which keeps nothing of the tail; use 'bucket', or dump with method 'threshold'"
            )
        if section.treatment != "unbiased" and method == "sampled":
            raise ConfigError(f"{given}'sampled', which keeps no entry exactly; use 'unbiased'")
        temperatures = stored_temperatures(identity, family)
        needs = section.treatment != "renormalise" and section.temperature != 1
        if needs and section.temperature not in temperatures:
            others = "treatment 'renormalise' or 'exact'" if family == "response" else "treatment 'renormalise'"
            raise ConfigError(
                f"{place}.{family}.temperature is {section.temperature:g}, but the cache keeps the log-sum-exp of "
                f"{', '.join(f'{each:g}' for each in (1.0, *temperatures))}; dump with cache.{family}.temperatures, "
                f"or take {others}"
            )
