"""The plan of a dump, made without loading a teacher: samples, parts and the identity of its cache."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
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
from teacher_dump.planning.answer_files import (
    ANSWERS_FOLDER,
    compute_answers_key,
    load_answered_settings,
    read_question_parts,
)
from teacher_dump.planning.answering_model import AnsweringModel, read_answering_model
from teacher_dump.planning.cached_plan import restore_answered_plan, restore_cached_plan
from teacher_dump.planning.recorded_budget import read_recorded_choices
from teacher_dump.prompts.preprocessor import TOKENISATION
from teacher_dump.prompts.processor import load_processor
from teacher_dump.settings import DumpSettings
from teacher_dump.teachers import fingerprint
from teacher_dump.teachers import hf_checkpoint as checkpoint
from teacher_dump.teachers.architectures import check_backend, check_families


@dataclass(frozen=True)
class DumpPlan:
    """The parts of a dump, the identity of its cache, and the teacher's checkpoint and processor facts."""

    plan: Plan
    identity: Identity
    checkpoint: Path
    facts: fingerprint.ProcessorFacts
    max_length: int  # tokens; teacher.max_length or the model's own limit, whichever is lower
    answering_model: AnsweringModel | None = None  # of a plan of questions for another model than the teacher


def plan_dump(settings: DumpSettings) -> DumpPlan:
    """Reads the samples and makes parts and identity. Caches hashes of weights in <run>/fingerprints.json.

    If answers are to be generated and do not exist yet, each answer is a placeholder.
    """
    if settings.data.responses == "dataset":
        return _make_dump_plan(settings)
    questions = plan_questions(settings)
    found = load_answered_settings(settings, questions.identity)
    return questions if found is None else _make_dump_plan(found)


def plan_questions(settings: DumpSettings) -> DumpPlan:
    """Plans the questions alone, for the teacher or the model that generates the answers."""
    return _make_dump_plan(settings)


def _make_dump_plan(settings: DumpSettings) -> DumpPlan:
    teacher, answers = settings.teacher, settings.data.responses != "dataset"
    needs_teacher = settings.data.responses == "teacher" or _needs_teacher(settings.cache)
    extracted = Path(settings.data.extracted or settings.run / "images")
    read = partial(read_samples, settings.data.sources, extracted=extracted, only_questions=answers, spool=settings.run)
    sample_set = read()
    if not sample_set.samples and not sample_set.errors:
        files = ", ".join(str(source.path) for source in settings.data.sources)
        raise ConfigError(f"data.sources: there is no sample in {files}; give files of conversations")
    folder = checkpoint.resolve_checkpoint(teacher.model, teacher.revision, with_weights=needs_teacher)
    if needs_teacher:
        config = checkpoint.read_json(folder / "config.json")
        check_backend(config, teacher.backend)
        check_families(config, settings.cache.families)
    memory = fingerprint.FingerprintMemory(settings.run / "fingerprints.json")
    trust = bool(teacher.settings.get("trust_remote_code", False))
    arguments = teacher.chat_template_arguments
    facts = memory.facts(folder, lambda: load_processor(folder, trust_remote_code=trust), arguments)
    facts = facts.with_background(settings.data.background)
    _check_background(folder, facts)
    max_length = min(teacher.max_length, _read_context_length(folder) or teacher.max_length)

    answering_model = None
    if settings.data.answering_model is not None:
        answering_model = read_answering_model(
            settings.data.answering_model,
            facts,
            memory,
            max_length=max_length,
            shows_images=any(sample.images for sample in sample_set.samples),
        )
        settings = replace(settings, answer_selection={"responses": answering_model.description})
    questions = None if settings.answers is None else read_question_parts(settings.answers)

    def make_parts(samples: Sequence[Sample], errors: Sequence[SampleError]) -> Plan:
        return make_plan(
            samples,
            errors=errors,
            samples_per_part=settings.dump.samples_per_part,
            max_length=max_length,
            too_long=settings.data.too_long,
            parts_of_ids=questions,
        )

    def read_again(watched: Collection[str]) -> SampleSet:
        return read(watched=watched)

    plan = make_parts(sample_set.samples, sample_set.errors)
    if not answers:
        plan = restore_cached_plan(plan, settings.cache.path, read_again=read_again, make_parts=make_parts)
    is_folder = Path(teacher.model).is_dir()
    dtype = fingerprint.NONE
    if needs_teacher:
        dtype = fingerprint.describe_served_dtype(_resolve_dtype(teacher, folder), teacher.settings)
    identity = Identity(
        teacher=str(folder) if is_folder else f"{teacher.model}@{teacher.revision or 'main'}",
        teacher_fingerprint=fingerprint.compute_weights_fingerprint(folder, memory)
        if needs_teacher
        else fingerprint.NONE,
        dtype=dtype,
        engine=fingerprint.get_engine_version(teacher.backend) if needs_teacher else fingerprint.NONE,
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
        selection=_describe_selection(settings.cache, read_recorded_choices(settings.cache))
        | {"tokens": _describe_tokens(settings)},
    )

    def identity_of(other: Plan) -> Identity:
        return identity.model_copy(update={"plan_fingerprint": other.fingerprint, "num_parts": len(other.parts)})

    if answers and has_cache(open_folder(settings.cache.path)):  # a retry may need the earlier plan
        plan = restore_answered_plan(
            plan,
            settings.run / ANSWERS_FOLDER,
            compute_key=lambda other: compute_answers_key(identity_of(other), settings.data.sampling),
            read_again=read_again,
            make_parts=make_parts,
        )
    return DumpPlan(plan, identity_of(plan), folder, facts, max_length, answering_model)


def _check_background(folder: Path, facts: fingerprint.ProcessorFacts) -> None:
    """Raises ConfigError if the teacher was trained by Stillhouse with another background."""
    trained = read_pixel_settings(folder)
    for name, theirs, ours in [] if trained is None or facts.pixels is None else trained.find_differences(facts.pixels):
        if name == "background":
            raise ConfigError(
                f"data.background is {ours}, but {folder} was trained with {theirs} ({PIXELS_FILE}); "
                f"set data.background to {theirs!r}"
            )


def _describe_tokens(settings: DumpSettings) -> dict[str, Any]:
    """Describes what decides a sample's token ids, besides tokenizer and template."""
    arguments = settings.teacher.chat_template_arguments
    given = {"chat_template_arguments": arguments} if arguments else {}
    return {"tokenisation": TOKENISATION, **given, **settings.answer_selection}


def _needs_teacher(cache: CacheSection) -> bool:
    """Returns whether any family needs the teacher; tokens and images do not."""
    return any(family != "images" for family in cache.families)


def _describe_selection(cache: CacheSection, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns, for each dumped family, the settings that decide what is stored."""
    chosen: dict[str, dict[str, Any]] = {}
    for family in cache.families:
        if family in ("images", "sequence"):  # they have no selection
            continue
        section = getattr(cache, family)
        ours = section.describe() if isinstance(section, SelectionSection) else section.model_dump(exclude_none=True)
        chosen[family] = ours | dict(recorded.get(family, {}))
    return chosen


def _resolve_dtype(teacher: TeacherSection, folder: Path) -> str:
    return checkpoint.read_saved_dtype(folder) if teacher.dtype == "auto" else teacher.dtype


def _read_context_length(folder: Path) -> int | None:
    path = folder / "config.json"
    return checkpoint.get_context_length(checkpoint.read_json(path)) if path.is_file() else None
