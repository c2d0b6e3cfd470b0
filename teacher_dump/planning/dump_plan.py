"""What a dump would do, known without a teacher in memory: samples, parts and the identity of its cache."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from storage.backends.folder import open_folder
from storage.config import CacheSection, SelectionSection
from storage.errors import ConfigError
from storage.identity import Identity
from storage.images.settings import PIXELS_FILE, read_pixel_settings
from storage.layout.segments import has_cache
from storage.records.records import SampleError
from teacher_dump.config import TeacherSection
from teacher_dump.data.dataset import SampleSet, read_samples
from teacher_dump.data.partition import Plan, make_plan
from teacher_dump.data.sample import Sample
from teacher_dump.planning.answer_files import ANSWERS_FOLDER, answered_settings, answers_key
from teacher_dump.planning.cached_plan import plan_as_answered, plan_as_cached
from teacher_dump.planning.recorded_budget import recorded_choices
from teacher_dump.prompts.preprocessor import TOKENISATION
from teacher_dump.prompts.processor import load_processor
from teacher_dump.settings import DumpSettings
from teacher_dump.teachers import fingerprint
from teacher_dump.teachers import hf_checkpoint as checkpoint


@dataclass(frozen=True)
class DumpPlan:
    """What a dump would do, known without a teacher in memory."""

    plan: Plan
    identity: Identity
    checkpoint: Path
    facts: fingerprint.ProcessorFacts
    max_length: int  # tokens; teacher.max_length or the model's own limit, whichever is lower


def plan_dump(settings: DumpSettings) -> DumpPlan:
    """Samples, parts and identity. Hashes of weights are remembered in the run's folder (fingerprints.json).

    Where the answers are to be the teacher's own and are not there yet, each is a placeholder.
    """
    if settings.data.responses == "dataset":
        return _plan(settings)
    questions = plan_questions(settings)
    found = answered_settings(settings, questions.identity)
    return questions if found is None else _plan(found)


def plan_questions(settings: DumpSettings) -> DumpPlan:
    """The plan of the questions alone, for a teacher that answers them itself."""
    return _plan(settings)


def _plan(settings: DumpSettings) -> DumpPlan:
    teacher, answers = settings.teacher, settings.data.responses == "teacher"
    asks_teacher = answers or _asks_teacher(settings.cache)
    extracted = Path(settings.data.extracted or settings.run / "images")
    read = partial(read_samples, settings.data.sources, extracted=extracted, only_questions=answers, spool=settings.run)
    sample_set = read()
    if not sample_set.samples and not sample_set.errors:
        files = ", ".join(str(source.path) for source in settings.data.sources)
        raise ConfigError(f"data.sources: there is no sample in {files}; give files of conversations")
    folder = checkpoint.local_checkpoint(teacher.model, teacher.revision, with_weights=asks_teacher)
    memory = fingerprint.FingerprintMemory(settings.run / "fingerprints.json")
    trust = bool(teacher.settings.get("trust_remote_code", False))
    arguments = teacher.chat_template_arguments
    facts = memory.facts(folder, lambda: load_processor(folder, trust_remote_code=trust), arguments)
    facts = facts.with_background(settings.data.background)
    _check_background(folder, facts)
    max_length = min(teacher.max_length, _context_length(folder) or teacher.max_length)

    def make(samples: Sequence[Sample], errors: Sequence[SampleError]) -> Plan:
        return make_plan(
            samples,
            errors=errors,
            samples_per_part=settings.dump.samples_per_part,
            max_length=max_length,
            too_long=settings.data.too_long,
        )

    def read_again(watched: Collection[str]) -> SampleSet:
        return read(watched=watched)

    plan = make(sample_set.samples, sample_set.errors)
    if not answers:
        plan = plan_as_cached(plan, settings.cache.path, read_again=read_again, make=make)
    is_folder = Path(teacher.model).is_dir()
    identity = Identity(
        teacher=str(folder) if is_folder else f"{teacher.model}@{teacher.revision or 'main'}",
        teacher_fingerprint=fingerprint.weights_fingerprint(folder, memory) if asks_teacher else fingerprint.NONE,
        dtype=fingerprint.served_dtype(_dtype(teacher, folder), teacher.settings) if asks_teacher else fingerprint.NONE,
        engine=fingerprint.engine_version(teacher.backend) if asks_teacher else fingerprint.NONE,
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        vocab_size=facts.vocab_size,
        chat_template_fingerprint=facts.chat_template_fingerprint,
        image_preprocessing_fingerprint=facts.image_preprocessing_fingerprint,
        pixels=facts.pixels,
        image_processor=facts.image_processor,
        image_token_id=facts.image_token_id,
        eos_token_ids=facts.eos_token_ids,
        plan_fingerprint=plan.fingerprint,
        num_parts=len(plan.parts),
        image_root=str(sample_set.image_root),
        selection=_selection(settings.cache, recorded_choices(settings.cache))
        | {"tokens": _tokens_selection(settings)},
    )

    def identity_of(other: Plan) -> Identity:
        return identity.model_copy(update={"plan_fingerprint": other.fingerprint, "num_parts": len(other.parts)})

    if answers and has_cache(open_folder(settings.cache.path)):  # which a retry may take up
        plan = plan_as_answered(
            plan,
            settings.run / ANSWERS_FOLDER,
            key_of=lambda other: answers_key(identity_of(other), settings.data.sampling),
            read_again=read_again,
            make=make,
        )
    return DumpPlan(plan, identity_of(plan), folder, facts, max_length)


def _check_background(folder: Path, facts: fingerprint.ProcessorFacts) -> None:
    """ConfigError: a teacher that was trained here, on transparent pixels that showed something else."""
    trained = read_pixel_settings(folder)
    for name, theirs, ours in [] if trained is None or facts.pixels is None else trained.find_differences(facts.pixels):
        if name == "background":
            raise ConfigError(
                f"data.background is {ours}, but {folder} was trained with {theirs} ({PIXELS_FILE}); "
                f"set data.background to {theirs!r}"
            )


def _tokens_selection(settings: DumpSettings) -> dict[str, Any]:
    """What decides a sample's token ids, besides tokenizer and template."""
    arguments = settings.teacher.chat_template_arguments
    given = {"chat_template_arguments": arguments} if arguments else {}
    return {"tokenisation": TOKENISATION, **given, **settings.answered}


def _asks_teacher(cache: CacheSection) -> bool:
    """False if tokens and images are all that is wanted."""
    return any(family != "images" for family in cache.families)


def _selection(cache: CacheSection, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the families that are dumped, the settings that decide what is stored."""
    fields = {"tau", "k", "mass", "draws", "seed", "draw_sets"}
    used = {"threshold": {"tau", "seed"}, "topk": {"k"}, "mass": {"mass"}, "sampled": {"draws", "seed"}}
    chosen: dict[str, dict[str, Any]] = {}
    for family in cache.families:
        if family in ("images", "sequence"):  # nothing about them is chosen
            continue
        section = getattr(cache, family)
        skipped = set()
        if isinstance(section, SelectionSection):
            several = {"draw_sets"} if section.draw_sets > 1 else set()  # older caches do not name it
            skipped = fields - used[section.method] - several
        chosen[family] = section.model_dump(mode="json", exclude=skipped, exclude_none=True) | dict(
            recorded.get(family, {})
        )
    return chosen


def _dtype(teacher: TeacherSection, folder: Path) -> str:
    return checkpoint.saved_dtype(folder) if teacher.dtype == "auto" else teacher.dtype


def _context_length(folder: Path) -> int | None:
    path = folder / "config.json"
    return checkpoint.context_length(checkpoint.read_json(path)) if path.is_file() else None
