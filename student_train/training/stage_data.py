"""What a stage trains and on what: caches, samples and student's checkpoint, checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from storage.errors import CacheError, ConfigError, IdentityError
from storage.identity import Identity, stored_pixels, stored_relation, stored_temperatures
from storage.images.image_root import find_image_root
from storage.reader.cache import Cache, find_first_sample_with_images, read_identity
from storage.reader.narrowing import Narrowing
from storage.records.records import TokensRecord
from student_train.config import SourceSection, StageSection
from student_train.data.batch_schedule import SampleTable
from student_train.data.collate import check_grid
from student_train.data.image_inputs import ImageInputs
from student_train.data.mixture import Mixture, Source
from student_train.data.sample_filter import filtered
from student_train.data.sample_images import ImageFolder
from student_train.losses.config import DRAWING_METHODS, DistributionLossSection, LossesSection
from student_train.losses.fused_linear import TeacherHead
from student_train.models.expert_parallel import check_experts
from student_train.models.loading import Checkpoint, check_fit, check_parts, read_checkpoint
from student_train.models.sparse_upcycling import is_sparse
from student_train.training.objective import CachedTeacher


@dataclass(frozen=True, eq=False)
class Material:
    """All that a stage needs but weights. The student fits every cache."""

    data: Mixture
    table: SampleTable
    checkpoint: Checkpoint

    @property
    def cache(self) -> Cache:
        """The cache of a stage that has one."""
        (source,) = self.data.sources
        return source.cache


def prepare(stage: StageSection, cache_path: str) -> Material:
    """Open and check everything. `cache_path`: where the stage names no cache.

    Errors: ConfigError, CacheError, IdentityError, StillhouseError.
    """
    checkpoint = fitting_checkpoint(stage, cache_path)
    data = open_mixture(stage, cache_path)
    if stage.losses.balance and stage.moe is None and not is_sparse(checkpoint.config):
        raise ConfigError(
            f"losses.balance is for routers, and {checkpoint.folder} has none; give the stage `moe`, or leave it out"
        )
    table = SampleTable(
        indices=data.indices,
        num_response_rows=_counts(data, lambda cache: cache.num_response_rows),
        num_images=_counts(data, lambda cache: cache.num_images),
        num_visual_rows=_counts(data, lambda cache: cache.num_visual_tokens),
        lengths=_lengths(data, checkpoint.grid.tokens_per_image) if stage.group_by_length else None,
        order=data.order(window_rows=stage.shuffle_rows),
    )
    return Material(data, table, checkpoint)


def open_mixture(stage: StageSection, cache_path: str) -> Mixture:
    """The samples that a stage trains on, whatever its student. Errors: ConfigError, CacheError."""
    sections = stage.sources(cache_path)
    return Mixture([_source(section, stage, len(sections)) for section in sections])


def _source(section: SourceSection, stage: StageSection, num_sources: int) -> Source:
    max_bytes = (stage.memory_mb << 20) // 2 // num_sources
    families = loss_families(stage.losses)
    cache = open_sealed(section.path, families, max_bytes=max_bytes, narrowing=narrowing(stage.losses))
    place = "losses" if num_sources == 1 else f"{section.path}: losses"
    check_losses(stage.losses, cache.identity, cache.families, place=place)
    indices = filtered(cache, chosen_samples(cache, section.splits or ()), section.filter or ())
    if not len(indices):
        shown = ", ".join(" ".join(map(str, condition)) for condition in section.filter or ())
        raise ConfigError(f"{section.path}: no sample of the splits {', '.join(section.splits or ())} has {shown}")
    if stage.losses.preference:
        indices = chosen_pairs(cache, indices)
    return Source(cache, indices, section.weight, section.images)


def _counts(data: Mixture, of_cache: Callable[[Cache], np.ndarray]) -> np.ndarray:
    """(s,) numbers of the samples that are trained on, of pairs their sums."""
    counts = [of_cache(source.cache)[source.indices].astype(np.int64) for source in data.sources]
    return np.concatenate([each if each.ndim == 1 else each.sum(1) for each in counts])


def _lengths(data: Mixture, tokens_per_image: int | None) -> np.ndarray:
    """(s,) positions of the samples with their images, of pairs the longer one's.

    Where a student's images differ in their numbers of tokens, the teacher's numbers stand for them.
    """
    found = []
    for source in data.sources:
        cache = source.cache
        visual = cache.num_visual_tokens if tokens_per_image is None else cache.num_images * tokens_per_image
        chosen = (cache.num_tokens.astype(np.int64) - cache.num_images + visual)[source.indices]
        found.append(chosen if chosen.ndim == 1 else chosen.max(1))
    return np.concatenate(found)


def fitting_checkpoint(stage: StageSection, cache_path: str) -> Checkpoint:
    """The student's checkpoint, if it fits every cache. Takes well under a second, whatever the sizes of the caches.

    Neither weights nor a cache's index are read: cache.json, and one sample for the losses that need its
    visual grid. Errors: IdentityError naming field, both values and what to do; those of `read_checkpoint`.
    """
    sections = stage.sources(cache_path)
    identities = {section.path: read_identity(section.path) for section in sections}
    checkpoint = read_checkpoint(stage.init)
    check_architecture(checkpoint, stage)
    notes = [note for identity in identities.values() for note in check_fit(checkpoint, identity)]
    checkpoint = replace(checkpoint, notes=tuple(dict.fromkeys(notes)))
    check_together(stage.losses, identities)
    if stage.losses.visual or stage.losses.relation:
        for section in sections:
            example = find_first_sample_with_images(section.path, section.splits or ())
            if example is not None:
                if checkpoint.grid.tokens_per_image and checkpoint.grid.teacher_tokens_per_image is None:
                    teacher_tokens = example.images[0].num_visual_tokens
                    checkpoint = replace(
                        checkpoint, grid=replace(checkpoint.grid, teacher_tokens_per_image=teacher_tokens)
                    )
                counts = _counts_of_sizes(checkpoint, section, identities[section.path], example)
                check_grid(example, checkpoint.grid, counts)
    return checkpoint


def check_architecture(checkpoint: Checkpoint, stage: StageSection) -> None:
    """ConfigError for modules that this student has not, and for what only a LLaVA is made to do."""
    if stage.expert_parallel > 1:
        check_experts(_num_experts(checkpoint, stage), stage.expert_parallel, student=checkpoint.folder)
    if checkpoint.is_llava:
        return
    check_parts(checkpoint, stage.train)
    kind = f"{checkpoint.folder} is a {checkpoint.config.model_type!r}"
    if stage.moe is not None:
        raise ConfigError(f"moe makes experts of the decoder of a LLaVA, and {kind}; leave it out")
    if stage.lora is not None:
        raise ConfigError(f"lora adapts the decoder of a LLaVA, and {kind}; leave it out")
    if stage.losses.balance is not None:
        raise ConfigError(f"losses.balance reads the routers of a sparse LLaVA, and {kind}; leave it out")


def _num_experts(checkpoint: Checkpoint, stage: StageSection) -> int | None:
    """Of the LLaVA that trains; None if there are none."""
    if stage.moe is not None:
        return stage.moe.experts
    is_sparse_llava = checkpoint.is_llava and is_sparse(checkpoint.config)
    return checkpoint.config.text_config.num_experts if is_sparse_llava else None


def _counts_of_sizes(
    checkpoint: Checkpoint, section: SourceSection, identity: Identity, example: TokensRecord
) -> list[int] | None:
    """Visual tokens that a student makes of a sample's images, where their sizes decide and they lie in a folder."""
    inputs, path = checkpoint.image_processor, example.images[0].path
    root = section.images or find_image_root([identity.image_root], section.path, example=path)
    if not isinstance(inputs, ImageInputs) or not all(image.file(root).is_file() for image in example.images):
        return None
    folder = ImageFolder(root, inputs, pixels=stored_pixels(identity))
    pictures = [folder.picture(image, sample_id=example.sample_id) for image in example.images]
    return [int(np.count_nonzero(inputs.ids(each.size) == checkpoint.grid.image_token_id)) for each in pictures]


def check_together(losses: LossesSection, identities: Mapping[str, Identity]) -> None:
    """IdentityError naming each field in which caches differ that one loss must read alike. By their paths."""
    asked: dict[str, Callable[[Identity], Any]] = {}
    if all(identity.image_token_id >= 0 for identity in identities.values()):
        for field in ("version", "background"):  # one student sees one kind of pixels
            asked[f"pixels.{field}"] = lambda each, field=field: getattr(stored_pixels(each), field)
    for family in ("response", "visual"):
        section: DistributionLossSection | None = getattr(losses, family)
        if section:
            asked[f"treatment of {family}"] = lambda each, family=family, section=section: section.resolve_treatment(
                _method(each, family)
            )
            asked[f"selection.{family}.temperatures"] = lambda each, family=family: stored_temperatures(each, family)
    if losses.response and losses.response.treatment == "exact":
        asked["teacher_fingerprint"] = lambda each: each.teacher_fingerprint  # one head makes all rows
    if losses.relation:
        asked["selection.relation.centered"] = lambda each: stored_relation(each).centered
        asked["selection.relation.pool"] = lambda each: stored_relation(each).pool
    (first, identity), *others = identities.items()
    problems = [
        f"{field}: {first} has {of(identity)}, {path} has {of(other)}"
        for path, other in others
        for field, of in asked.items()
        if of(identity) != of(other)
    ]
    if problems:
        raise IdentityError(
            "the caches of this stage do not go together; dump them alike, or leave the losses out that read it:"
            + "".join(f"\n  {problem}" for problem in problems)
        )


def cached_teacher(material: Material, losses: LossesSection) -> CachedTeacher:
    """What these losses need of the caches besides their rows; reads profiles and the head. Errors: CacheError."""
    identity = material.data.identity
    relation = stored_relation(identity)
    sections = {name: section for name in ("response", "visual") if (section := getattr(losses, name))}
    return CachedTeacher(
        centered=relation.centered,
        pool=relation.pool,
        treatments={name: section.resolve_treatment(_method(identity, name)) for name, section in sections.items()},
        temperatures={name: stored_temperatures(identity, name) for name in sections},
        profiles={
            name: torch.from_numpy(_tail_profile(material.data, name))
            for name, section in sections.items()
            if section.treatment == "profile"
        },
        head=_teacher_head(material.data.sources[0].cache)
        if any(each.treatment == "exact" for each in sections.values())
        else None,
    )


def _tail_profile(data: Mixture, family: str) -> np.ndarray:
    """(v,) the caches' profiles, by the rows that an epoch has of each: it sums to 1."""
    rows = {"response": lambda cache: cache.num_response_rows, "visual": lambda cache: cache.num_visual_tokens}[family]
    weights = [source.weight * float(rows(source.cache)[source.indices].sum()) for source in data.sources]
    profiles = [source.cache.tail_profile(family) for source in data.sources]
    if len(profiles) == 1 or not sum(weights):
        return profiles[0]
    return np.average(profiles, axis=0, weights=weights).astype(np.float32)


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
    asked = {family: each.narrowing for family, each in sections.items() if each}
    return {family: each for family, each in asked.items() if each}


def _method(identity: Identity, family: str) -> str | None:
    """How a family's rows were selected."""
    return identity.selection.get(family, {}).get("method")


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
    return samples_of_any([cache], splits)[0]


def samples_of_any(caches: Sequence[Cache], splits: tuple[str, ...]) -> list[np.ndarray]:
    """Each cache's indices of the samples of some splits, one or more in all. ConfigError if there are none."""
    chosen = [cache.splits.find_positions(splits) for cache in caches]
    if not any(map(len, chosen)):
        known = sorted({split for cache in caches for split in cache.splits.unique()})
        raise ConfigError(
            f"{', '.join(str(cache.folder) for cache in caches)}: no sample is in the splits "
            f"{', '.join(splits) or '(none)'}; the {'cache has' if len(caches) == 1 else 'caches have'} "
            f"{', '.join(known) or 'no samples'}"
        )
    return chosen


def chosen_pairs(cache: Cache, indices: np.ndarray) -> np.ndarray:
    """(p, 2) chosen and rejected of every preference pair among some samples, one or more. ConfigError if none is."""
    pairs = cache.find_pair_positions()
    found = pairs[np.isin(pairs, indices).all(axis=1)]
    if not len(found):
        raise ConfigError(
            f"{cache.folder}: losses.preference trains on pairs, and none of the {len(indices)} samples is half of "
            "one; dump preference pairs with the family sequence, or give stages.NAME.splits theirs"
        )
    return found


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
        asked = section.narrowing
        if asked:
            asked.check(identity.selection.get(family, {}), f"{place}.{family}")
        method = _method(identity, family)
        treatment = section.resolve_treatment(method)
        given = f"{place}.{family}.treatment is {treatment!r}, but the cache's {family} rows were selected by "
        if treatment == "unbiased" and method not in DRAWING_METHODS:
            raise ConfigError(
                f"{given}{method!r}, which keeps nothing of the tail; use 'bucket', or dump with method 'threshold'"
            )
        if treatment != "unbiased" and method == "sampled":
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
