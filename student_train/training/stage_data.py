"""Opens a stage's caches, samples and student checkpoint, and checks them against each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from storage.errors import CacheError, ConfigError, IdentityError
from storage.identity import Identity, stored_pixels, stored_relation, stored_selection, stored_temperatures
from storage.images.image_root import find_image_root
from storage.reader.cache import Cache, find_first_sample_with_images, read_identity
from storage.reader.narrowing import Narrowing
from storage.records.records import TokensRecord
from student_train.config import SourceSection, StageSection
from student_train.data.batch_schedule import SampleTable
from student_train.data.collate import check_visual_grid
from student_train.data.image_inputs import ImageProcessorAdapter
from student_train.data.mixture import CacheSource, Mixture
from student_train.data.sample_filter import filter_samples
from student_train.data.sample_images import ImageFolder
from student_train.losses.config import DistributionLossSection, LossesSection
from student_train.losses.head_products import TeacherHead
from student_train.models.expert_parallel import check_experts
from student_train.models.loading import Checkpoint, check_fit, check_trained_parts, read_checkpoint
from student_train.models.sparse_upcycling import is_sparse
from student_train.training.objective import CachedTeacher


@dataclass(frozen=True, eq=False)
class StageData:
    """Everything a stage needs except weights: data, sample table and a checkpoint that fits every cache."""

    mixture: Mixture
    table: SampleTable
    checkpoint: Checkpoint

    @property
    def cache(self) -> Cache:
        """The cache of a stage with a single one."""
        (source,) = self.mixture.sources
        return source.cache


def prepare_stage_data(stage: StageSection, cache_path: str) -> StageData:
    """Open and check all data of a stage. `cache_path`: used if the stage names no cache.

    Errors: ConfigError, CacheError, IdentityError, StillhouseError.
    """
    checkpoint = read_fitting_checkpoint(stage, cache_path)
    data = open_mixture(stage, cache_path)
    if stage.losses.balance and stage.moe is None and not is_sparse(checkpoint.config):
        raise ConfigError(
            f"losses.balance needs routers, but {checkpoint.folder} has none; give the stage `moe`, or remove the loss"
        )
    table = SampleTable(
        indices=data.indices,
        num_response_rows=_collect_counts(data, lambda cache: cache.num_response_rows),
        num_images=_collect_counts(data, lambda cache: cache.num_images),
        num_visual_rows=_collect_counts(data, lambda cache: cache.num_visual_tokens),
        lengths=_compute_lengths(data, checkpoint.sequence_format.tokens_per_image) if stage.group_by_length else None,
        order=data.order(window_rows=stage.shuffle_rows),
    )
    return StageData(data, table, checkpoint)


def open_mixture(stage: StageSection, cache_path: str) -> Mixture:
    """Open the samples that a stage trains on, for any student. Errors: ConfigError, CacheError."""
    sections = stage.list_sources(cache_path)
    return Mixture([_open_source(section, stage, len(sections)) for section in sections])


def _open_source(section: SourceSection, stage: StageSection, num_sources: int) -> CacheSource:
    max_bytes = (stage.memory_mb << 20) // 2 // num_sources
    families = list_loss_families(stage.losses)
    cache = open_sealed_cache(section.path, families, max_bytes=max_bytes, narrowing=collect_narrowing(stage.losses))
    place = "losses" if num_sources == 1 else f"{section.path}: losses"
    check_losses(stage.losses, cache.identity, cache.families, place=place)
    indices = filter_samples(cache, select_samples(cache, section.splits or ()), section.filter or ())
    if not len(indices):
        shown = ", ".join(" ".join(map(str, condition)) for condition in section.filter or ())
        raise ConfigError(
            f"{section.path}: no sample of the splits {', '.join(section.splits or ())} meets the filter {shown}; "
            "relax it, or give other splits"
        )
    if stage.losses.preference:
        indices = select_pairs(cache, indices)
    return CacheSource(cache, indices, section.weight, section.images)


def _collect_counts(data: Mixture, of_cache: Callable[[Cache], np.ndarray]) -> np.ndarray:
    """Collect a count (s,) of each trained sample; the sum of both for a pair."""
    counts = [of_cache(source.cache)[source.indices].astype(np.int64) for source in data.sources]
    return np.concatenate([each if each.ndim == 1 else each.sum(1) for each in counts])


def _compute_lengths(data: Mixture, tokens_per_image: int | None) -> np.ndarray:
    """Compute the length (s,) of each sample, images included; the longer one's for a pair.

    If a student's number of tokens depends on the image, the teacher's number is used instead.
    """
    lengths = []
    for source in data.sources:
        cache = source.cache
        visual = cache.num_visual_tokens if tokens_per_image is None else cache.num_images * tokens_per_image
        chosen = (cache.num_tokens.astype(np.int64) - cache.num_images + visual)[source.indices]
        lengths.append(chosen if chosen.ndim == 1 else chosen.max(1))
    return np.concatenate(lengths)


def read_fitting_checkpoint(stage: StageSection, cache_path: str) -> Checkpoint:
    """Read the student's checkpoint and check that it fits every cache; well under a second for any cache size.

    Reads neither weights nor a cache's index, only cache.json, and one sample for losses that need its visual grid.
    Errors: IdentityError with field, both values and what to do; those of `read_checkpoint`.
    """
    sections = stage.list_sources(cache_path)
    identities = {section.path: read_identity(section.path) for section in sections}
    checkpoint = read_checkpoint(stage.init)
    check_architecture(checkpoint, stage)
    notes = [note for identity in identities.values() for note in check_fit(checkpoint, identity)]
    checkpoint = replace(checkpoint, notes=tuple(dict.fromkeys(notes)))
    check_caches_agree(stage.losses, identities)
    if stage.losses.visual or stage.losses.relation:
        for section in sections:
            example = find_first_sample_with_images(section.path, section.splits or ())
            if example is not None:
                if (
                    checkpoint.sequence_format.tokens_per_image
                    and checkpoint.sequence_format.teacher_tokens_per_image is None
                ):
                    teacher_tokens = example.images[0].num_visual_tokens
                    checkpoint = replace(
                        checkpoint,
                        sequence_format=replace(checkpoint.sequence_format, teacher_tokens_per_image=teacher_tokens),
                    )
                counts = _count_visual_tokens(checkpoint, section, identities[section.path], example)
                for image, count in zip(example.images, counts, strict=True):
                    check_visual_grid(image, example.sample_id, checkpoint.sequence_format, count)
    return checkpoint


def check_architecture(checkpoint: Checkpoint, stage: StageSection) -> None:
    """Check that the student has the modules that the stage names, and supports its options. Errors: ConfigError."""
    if stage.expert_parallel > 1:
        check_experts(_count_experts(checkpoint, stage), stage.expert_parallel, student=checkpoint.folder)
    if checkpoint.is_llava:
        return
    check_trained_parts(checkpoint, stage.train)
    kind = f"{checkpoint.folder} is a {checkpoint.config.model_type!r}"
    if stage.moe is not None:
        raise ConfigError(f"moe needs the decoder of a LLaVA, but {kind}; remove moe")
    if stage.lora is not None:
        raise ConfigError(f"lora needs the decoder of a LLaVA, but {kind}; remove lora")
    if stage.losses.balance is not None:
        raise ConfigError(f"losses.balance needs the routers of a sparse LLaVA, but {kind}; remove the loss")


def _count_experts(checkpoint: Checkpoint, stage: StageSection) -> int | None:
    """Return the number of experts of the LLaVA that trains; None if it is dense."""
    if stage.moe is not None:
        return stage.moe.experts
    is_sparse_llava = checkpoint.is_llava and is_sparse(checkpoint.config)
    return checkpoint.config.text_config.num_experts if is_sparse_llava else None


def _count_visual_tokens(
    checkpoint: Checkpoint, section: SourceSection, identity: Identity, example: TokensRecord
) -> Sequence[int | None]:
    """Count the student's visual tokens of a sample's images; None if the number is fixed or a file is missing."""
    inputs, path = checkpoint.image_processor, example.images[0].path
    root = section.images or find_image_root([identity.image_root], section.path, example=path)
    if not isinstance(inputs, ImageProcessorAdapter) or not all(image.file(root).is_file() for image in example.images):
        return [None] * len(example.images)
    folder = ImageFolder(root, inputs, pixels=stored_pixels(identity))
    pictures = [folder.load_picture(image, sample_id=example.sample_id) for image in example.images]
    return [
        int(np.count_nonzero(inputs.expand_image(each.size) == checkpoint.sequence_format.image_token_id))
        for each in pictures
    ]


def check_caches_agree(losses: LossesSection, identities: Mapping[str, Identity]) -> None:
    """Check that caches agree in each field that their losses need. `identities`: by path. Errors: IdentityError."""
    getters: dict[str, Callable[[Identity], Any]] = {}
    if all(identity.image_token_id >= 0 for identity in identities.values()):
        for field in ("version", "background"):  # a student is trained on one kind of pixels
            getters[f"pixels.{field}"] = lambda each, field=field: getattr(stored_pixels(each), field)
    for family in ("response", "visual"):
        section: DistributionLossSection | None = getattr(losses, family)
        if section:
            getters[f"treatment of {family}"] = lambda each, family=family, section=section: section.resolve_treatment(
                stored_selection(each, family)
            )
            getters[f"selection.{family}.temperatures"] = lambda each, family=family: stored_temperatures(each, family)
    if losses.response and losses.response.treatment == "exact":
        getters["teacher_fingerprint"] = lambda each: each.teacher_fingerprint  # all rows are computed with one head
    if losses.relation:
        getters["selection.relation.centered"] = lambda each: stored_relation(each).centered
        getters["selection.relation.pool"] = lambda each: stored_relation(each).pool
    (first, identity), *others = identities.items()
    problems = [
        f"{field}: {first} has {of(identity)}, {path} has {of(other)}"
        for path, other in others
        for field, of in getters.items()
        if of(identity) != of(other)
    ]
    if problems:
        raise IdentityError(
            "the caches of this stage differ in fields that its losses need; dump them with equal settings, or remove "
            "these losses:" + "".join(f"\n  {problem}" for problem in problems)
        )


def load_cached_teacher(stage_data: StageData, losses: LossesSection) -> CachedTeacher:
    """Load what losses need of the caches besides their rows: settings, tail profiles, head. Errors: CacheError."""
    identity = stage_data.mixture.identity
    relation = stored_relation(identity)
    sections = {name: section for name in ("response", "visual") if (section := getattr(losses, name))}
    return CachedTeacher(
        centered=relation.centered,
        pool=relation.pool,
        treatments={
            name: section.resolve_treatment(stored_selection(identity, name)) for name, section in sections.items()
        },
        temperatures={name: stored_temperatures(identity, name) for name in sections},
        profiles={
            name: torch.from_numpy(_average_tail_profiles(stage_data.mixture, name))
            for name, section in sections.items()
            if section.treatment == "profile"
        },
        head=_load_teacher_head(stage_data.mixture.sources[0].cache)
        if any(each.treatment == "exact" for each in sections.values())
        else None,
    )


def _average_tail_profiles(data: Mixture, family: str) -> np.ndarray:
    """Average the caches' tail profiles (v,), weighted by their rows in an epoch; the result sums to 1."""
    rows = {"response": lambda cache: cache.num_response_rows, "visual": lambda cache: cache.num_visual_tokens}[family]
    weights = [source.weight * float(rows(source.cache)[source.indices].sum()) for source in data.sources]
    profiles = [source.cache.tail_profile(family) for source in data.sources]
    if len(profiles) == 1 or not sum(weights):
        return profiles[0]
    return np.average(profiles, axis=0, weights=weights).astype(np.float32)


def _load_teacher_head(cache: Cache) -> TeacherHead:
    head = cache.head()
    weight = torch.from_numpy(head.weight.copy())  # the reader's array is read-only
    if head.weight.dtype == np.uint16:
        weight = weight.view(torch.bfloat16)
    bias = None if head.bias is None else torch.from_numpy(head.bias.copy())
    return TeacherHead(weight, bias, head.scale, head.soft_cap)


def collect_narrowing(losses: LossesSection) -> dict[str, Narrowing]:
    """Return the narrowing of each family of which less is read than is stored."""
    sections = {"response": losses.response, "visual": losses.visual}
    asked = {family: each.narrowing for family, each in sections.items() if each}
    return {family: each for family, each in asked.items() if each}


def open_sealed_cache(
    path: str, families: tuple[str, ...], *, max_bytes: int, narrowing: Mapping[str, Narrowing] | None = None
) -> Cache:
    """Open a cache whose dump has finished, with `max_bytes` of memory for reading. Errors: CacheError."""
    cache = Cache.open(path, families, max_bytes=max_bytes, narrowing=narrowing)
    if not cache.sealed:
        raise CacheError(f"{path}: its dump has not finished (there is no manifest.json); run the same dump again")
    return cache


def select_samples(cache: Cache, splits: tuple[str, ...]) -> np.ndarray:
    """Return the indices of the samples of some splits, one or more. ConfigError if there are none."""
    return select_samples_of_caches([cache], splits)[0]


def select_samples_of_caches(caches: Sequence[Cache], splits: tuple[str, ...]) -> list[np.ndarray]:
    """Return each cache's indices of the samples of some splits. ConfigError if there are none in any cache."""
    chosen = [cache.splits.find_positions(splits) for cache in caches]
    if not any(map(len, chosen)):
        known = sorted({split for cache in caches for split in cache.splits.unique()})
        raise ConfigError(
            f"{', '.join(str(cache.folder) for cache in caches)}: no sample is in the splits "
            f"{', '.join(splits) or '(none)'}; the {'cache has' if len(caches) == 1 else 'caches have'} "
            f"{', '.join(known) or 'no samples'}; give one of these"
        )
    return chosen


def check_evaluation_splits(stage: StageSection, mixture: Mixture, splits: tuple[str, ...]) -> None:
    """ConfigError if the caches that the stage's result is evaluated on have no sample in these splits."""
    caches = [source.cache for source in mixture.sources]
    if stage.evaluation_cache is not None:
        caches = [Cache.open(stage.evaluation_cache, ())]
    select_samples_of_caches(caches, splits)


def select_pairs(cache: Cache, indices: np.ndarray) -> np.ndarray:
    """Return the (chosen, rejected) indices (p, 2) of all preference pairs among some samples. ConfigError: none."""
    pairs = cache.find_pair_positions()
    found = pairs[np.isin(pairs, indices).all(axis=1)]
    if not len(found):
        raise ConfigError(
            f"{cache.folder}: losses.preference trains on pairs, but there is none among the {len(indices)} samples; "
            "dump preference pairs with the family sequence, or give their splits as stages.NAME.splits"
        )
    return found


def list_loss_families(losses: LossesSection) -> tuple[str, ...]:
    """Return the families of the cache that these losses read, besides tokens."""
    families = [family for family in ("response", "visual", "relation") if getattr(losses, family)]
    if losses.response and losses.response.treatment == "exact":
        families[0] = "hidden"
    return (*families, "sequence") if losses.preference else tuple(families)


def check_losses(losses: LossesSection, identity: Identity, held: Collection[str], *, place: str) -> None:
    """Check that a cache with the families `held` can serve these losses; it need not exist yet.

    Errors: ConfigError.
    """
    for family in list_loss_families(losses):
        if family not in held:
            raise ConfigError(f"{place}: these losses read {family}, which is not dumped; add it to cache.families")
    for family in ("response", "visual"):
        section = getattr(losses, family)
        if section is None or section.treatment == "exact":
            continue
        asked = section.narrowing
        if asked:
            asked.check(stored_selection(identity, family), f"{place}.{family}")
        selection = stored_selection(identity, family)
        treatment = section.resolve_treatment(selection)
        given = f"{place}.{family}.treatment is {treatment!r}, but the cache's {family} rows were selected by "
        method = selection and selection.name
        if treatment == "unbiased" and not (selection and selection.samples_tail):
            raise ConfigError(
                f"{given}{method!r}, which does not sample the tail; use 'bucket', or dump with method 'threshold'"
            )
        if treatment != "unbiased" and selection and not selection.keeps_exact:
            raise ConfigError(f"{given}{method!r}, which stores no exact entries; use 'unbiased'")
        temperatures = stored_temperatures(identity, family)
        needs = section.treatment != "renormalise" and section.temperature != 1
        if needs and section.temperature not in temperatures:
            others = "treatment 'renormalise' or 'exact'" if family == "response" else "treatment 'renormalise'"
            raise ConfigError(
                f"{place}.{family}.temperature is {section.temperature:g}, but the cache stores the log-sum-exp of "
                f"{', '.join(f'{each:g}' for each in (1.0, *temperatures))}; dump with cache.{family}.temperatures, "
                f"or take {others}"
            )
