"""The dump: samples to a sealed cache, by workers that this file plans for and counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from storage.config import BudgetSection, CacheSection, SelectionSection
from storage.errors import ConfigError, StillhouseError
from storage.files import Folder, is_url, open_folder
from storage.hidden import MAX_FLOAT16
from storage.identity import Identity
from storage.reader import Cache
from storage.records import SampleError
from storage.sections import Sections, read_sections
from storage.segments import find_segment, has_cache, merged_identity, read_segments
from storage.tail_profile import tail_parts
from storage.writer import CacheWriter
from teacher_dump import checkpoint, fingerprint
from teacher_dump.config import DataSection, DumpSection, TeacherSection
from teacher_dump.log_file import quiet
from teacher_dump.plan import Plan, make_plan
from teacher_dump.processor import load_processor
from teacher_dump.progress import DumpSummary, error_kinds
from teacher_dump.reading import read_samples
from teacher_dump.samples import SampleRefusedError
from teacher_dump.writing import LOG_FILE, write_parts

if TYPE_CHECKING:  # these import torch, which a dump over a complete cache does without
    from teacher_dump.scoring import PartScorer, RowRequest, SignalRequest
    from teacher_dump.worker import WorkerSettings

A = TypeVar("A")
B = TypeVar("B")

SCHEMAS = {"data": DataSection, "teacher": TeacherSection, "dump": DumpSection, "cache": CacheSection}
SUMMARY_FILE = "dump.json"
_SHOWN_ERRORS = 5
_SHOWN_KINDS = 8


class DumpStoppedError(StillhouseError):
    """The dump was told to stop, and did between two parts."""


@dataclass(frozen=True)
class DumpSettings:
    """The sections that a dump needs."""

    run: Path  # the run's folder: logs, fingerprints, views of the checkpoint
    data: DataSection
    teacher: TeacherSection
    dump: DumpSection
    cache: CacheSection
    answered: dict[str, Any] = field(default_factory=dict)  # how the answers were made, if they are the teacher's

    @staticmethod
    def from_sections(sections: Sections) -> DumpSettings:
        """From sections that were read with (at least) `SCHEMAS`."""
        return DumpSettings(sections.run, *(sections[name] for name in SCHEMAS))

    @property
    def logs(self) -> Path:
        return self.run / "logs"


@dataclass(frozen=True)
class DumpResult:
    """A sealed cache, and what this dump did for it."""

    cache: str  # folder or URL
    num_parts: int  # in the cache
    num_samples: int  # in the cache
    num_errors: int  # in the cache
    segments: tuple[int, ...]  # of the cache, that this dump was about
    summary: DumpSummary | None  # of the last segment that was written; None: every part was there already


@dataclass(frozen=True)
class DumpPlan:
    """What a dump would do, known without a teacher in memory."""

    plan: Plan
    identity: Identity
    checkpoint: Path
    facts: fingerprint.ProcessorFacts
    max_length: int  # tokens; teacher.max_length or the model's own limit, whichever is lower


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> DumpSettings:
    """The dump's sections of a YAML file. ConfigError for a user's mistake."""
    return DumpSettings.from_sections(read_sections(path, SCHEMAS, overrides))


def run_dump(settings: DumpSettings, *, progress: bool = True) -> DumpResult:
    """Write whatever parts and families a cache lacks, and seal it. A complete cache is left as it is.

    Over a cache of the same samples only the families that it lacks are dumped; with `cache.append` other samples
    are added as new parts. A dump that was not finished is finished first.

    With no families (but images) it writes tokens, in this process, and starts neither Ray nor a teacher.
    Errors: ConfigError; IdentityError where another cache lies in the place; StillhouseError, among others
    when more samples fail than dump.max_error_fraction allows (the cache then stays unsealed).
    """
    settings = _answered(settings, progress=progress)
    planned, cache = with_budget(plan_dump(settings), settings), settings.cache
    summary: DumpSummary | None = None
    finished: set[int] = set()
    while (writer := _open_writer(planned, settings)).segment.number not in finished:
        summary = _fill(writer, planned, settings, progress=progress) or summary
        writer.seal()
        finished.add(writer.segment.number)
    whole = Cache.open(cache.path, families=())
    return DumpResult(
        cache=cache.path,
        num_parts=whole.num_parts,
        num_samples=whole.num_samples,
        num_errors=len(whole.errors),
        segments=tuple(sorted(finished)),
        summary=summary,
    )


def _open_writer(planned: DumpPlan, settings: DumpSettings) -> CacheWriter:
    """The segment to go on with, or a new one; a complete one when nothing is left to do."""
    cache = settings.cache
    return CacheWriter.open(
        cache.path,
        planned.identity,
        cache.families,
        append=cache.append,
        sample_ids=[sample.id for part in planned.plan.parts for sample in part.samples],
        zstd_level=cache.zstd_level,
    )


def _fill(writer: CacheWriter, planned: DumpPlan, settings: DumpSettings, *, progress: bool) -> DumpSummary | None:
    """Write the parts that a segment lacks, with its own families; None if it lacks none.

    Errors: DumpStoppedError; StillhouseError for too many errors, as soon as it is sure that there will be.
    """
    committed = writer.committed_parts()
    missing = [part for part in planned.plan.parts if part.number not in committed]
    num_rows = planned.plan.num_samples + sum(len(part.errors) for part in planned.plan.parts)
    max_errors = settings.dump.max_error_fraction * num_rows
    num_samples, errors = writer.contents()
    _refuse_errors(num_samples, errors, settings.dump, max_errors, num_missing=len(missing))
    if not missing:
        return None
    writer.unseal()
    own = settings.cache.model_copy(update={"families": writer.segment.families})
    done, stopped = write_parts(
        missing,
        worker_settings(planned, replace(settings, cache=own)),
        dump=settings.dump,
        run=settings.run,
        committed=writer.committed_parts,
        max_errors=max_errors - len(errors) if writer.segment.has_tokens else math.inf,
        progress=progress,
    )
    num_samples, errors = writer.contents()
    summary = done.summary(errors)
    if done.num_parts:
        writer.folder.write(SUMMARY_FILE, f"{json.dumps(asdict(summary), indent=1)}\n".encode())
    num_missing = len(planned.plan.parts) - len(writer.committed_parts())
    _refuse_errors(num_samples, errors, settings.dump, max_errors, num_missing=num_missing)
    if num_missing and stopped:
        raise DumpStoppedError(
            f"stopped by SIGTERM: {done.num_parts:,} parts were written, {num_missing:,} are left; "
            "run the same command again to go on from here"
        )
    return summary


def _refuse_errors(
    num_samples: int, errors: Sequence[SampleError], dump: DumpSection, max_errors: float, *, num_missing: int
) -> None:
    """StillhouseError if too many samples of a segment, of which `num_missing` parts are to come, have no record."""
    if len(errors) <= max_errors and (num_samples or num_missing):
        return
    fraction = len(errors) / max(num_samples + len(errors), 1)
    kinds = "".join(f"\n  {count:,} × {kind}" for kind, count in list(error_kinds(errors).items())[:_SHOWN_KINDS])
    shown = "".join(f"\n  {error.sample_id}: {error.reason}" for error in errors[:_SHOWN_ERRORS])
    more = f"\n  … and {len(errors) - _SHOWN_ERRORS} more" if len(errors) > _SHOWN_ERRORS else ""
    early = f"; {num_missing:,} parts are left, but no more than {max_errors:,.0f} may fail" if num_missing else ""
    raise StillhouseError(
        f"{len(errors)} of {num_samples + len(errors)} samples failed ({fraction:.1%}; "
        f"dump.max_error_fraction is {dump.max_error_fraction:.1%}){early}:{kinds}\nsuch as{shown}{more}"
    )


def _answered(settings: DumpSettings, *, progress: bool) -> DumpSettings:
    """The settings of a dump over the answers that `data.responses` asks for, which are made if they are not there."""
    if settings.data.responses == "dataset":
        return settings
    from teacher_dump import answers

    questions = plan_questions(settings)
    found = answers.answered_settings(settings, questions)
    if found is None:
        answers.ask(settings, questions, progress=progress)
        found = answers.answered_settings(settings, questions)
    assert found is not None
    return found


def plan_dump(settings: DumpSettings) -> DumpPlan:
    """Samples, parts and identity. Hashes of weights are remembered in the run's folder (fingerprints.json).

    Where the answers are to be the teacher's own and are not there yet, each is a placeholder.
    """
    if settings.data.responses == "dataset":
        return _plan(settings)
    from teacher_dump import answers

    questions = plan_questions(settings)
    found = answers.answered_settings(settings, questions)
    return questions if found is None else _plan(found)


def plan_questions(settings: DumpSettings) -> DumpPlan:
    """The plan of the questions alone, for a teacher that answers them itself."""
    return _plan(settings)


def _plan(settings: DumpSettings) -> DumpPlan:
    teacher, answers = settings.teacher, settings.data.responses == "teacher"
    asks_teacher = answers or _asks_teacher(settings.cache)
    extracted = Path(settings.data.extracted or settings.run / "images")
    sample_set = read_samples(settings.data.sources, extracted=extracted, only_questions=answers)
    if not sample_set.samples and not sample_set.errors:
        files = ", ".join(str(source.path) for source in settings.data.sources)
        raise ConfigError(f"data.sources: there is no sample in {files}; give files of conversations")
    folder = checkpoint.local_checkpoint(teacher.model, teacher.revision, with_weights=asks_teacher)
    memory = fingerprint.FingerprintMemory(settings.run / "fingerprints.json")
    trust = bool(teacher.settings.get("trust_remote_code", False))
    facts = memory.facts(folder, lambda: load_processor(folder, trust_remote_code=trust))
    max_length = min(teacher.max_length, _context_length(folder) or teacher.max_length)
    plan = make_plan(
        sample_set.samples,
        errors=sample_set.errors,
        samples_per_part=settings.dump.samples_per_part,
        max_length=max_length,
        too_long=settings.data.too_long,
    )
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
        image_token_id=facts.image_token_id,
        eos_token_ids=facts.eos_token_ids,
        plan_fingerprint=plan.fingerprint,
        num_parts=len(plan.parts),
        image_root=str(sample_set.image_root),
        selection=_selection(settings.cache, _recorded(settings.cache))
        | ({"tokens": settings.answered} if settings.answered else {}),
    )
    return DumpPlan(plan, identity, folder, facts, max_length)


def with_budget(planned: DumpPlan, settings: DumpSettings) -> DumpPlan:
    """The plan with what cache.budget chooses in its identity; asks a teacher where no cache has it recorded.

    Errors: ConfigError for a budget that cannot be met, with the nearest numbers; those of with_teacher.
    """
    cache, budget = settings.cache, settings.cache.budget
    asked = budget.families if budget is not None else ()
    missing = [family for family in asked if "budget" not in planned.identity.selection[family]]
    if budget is None or not missing:
        return planned
    folder = open_folder(settings.cache.path)
    if has_cache(folder):  # one that was made otherwise is refused before anything is scored
        find_segment(
            folder, _to_compare(planned.identity, budget, folder), settings.cache.families, append=cache.append
        )
    from teacher_dump.budget_slice import Wanted, calibrate, spread

    samples = spread([sample for part in planned.plan.parts for sample in part.samples], budget.samples)
    sections = {family: getattr(settings.cache, family) for family in missing}
    wanted = Wanted(samples, budget, sections, settings.dump.samples_per_part, settings.cache.zstd_level)
    chosen = with_teacher(planned, settings, calibrate, wanted)
    selection = dict(planned.identity.selection)
    for family, choice in chosen.items():
        predicted = asdict(choice)
        setting = {name: predicted.pop(name) for name in ("tau", "rounding_kl")}
        selection[family] = {**selection[family], **setting, "budget": {**_asked(budget), "predicted": predicted}}
    return replace(planned, identity=planned.identity.model_copy(update={"selection": selection}))


def _to_compare(identity: Identity, budget: BudgetSection, folder: Folder) -> Identity:
    """An identity that differs from a cache's by what was asked, not by what a budget has yet to choose."""
    stored, selection = merged_identity(read_segments(folder)).selection, dict(identity.selection)
    for family in budget.families:
        there = stored.get(family, {})
        chosen = {name: there[name] for name in ("tau", "rounding_kl") if name in there}
        predicted = {name: value for name, value in there.get("budget", {}).items() if name == "predicted"}
        selection[family] = {**selection[family], **chosen, "budget": {**_asked(budget), **predicted}}
    return identity.model_copy(update={"selection": selection})


def _asked(budget: BudgetSection) -> dict[str, Any]:
    return budget.model_dump(mode="json", exclude={"families"}, exclude_none=True)


def _recorded(cache: CacheSection) -> dict[str, dict[str, Any]]:
    """What the same budget has chosen for a cache that lies there already, by family."""
    folder = open_folder(cache.path) if cache.budget else None
    if cache.budget is None or folder is None or not has_cache(folder):
        return {}
    stored, found = merged_identity(read_segments(folder)).selection, {}
    for family in cache.budget.families:
        budget = dict(stored.get(family, {}).get("budget", {}))
        budget.pop("predicted", None)
        if budget == _asked(cache.budget):
            found[family] = {name: stored[family][name] for name in ("tau", "rounding_kl", "budget")}
    return found


def prompt_errors(settings: DumpSettings, planned: DumpPlan, *, progress: bool = True) -> list[SampleError]:
    """Every row of the sources that a dump would count as an error, as far as that shows without a teacher.

    Builds all prompts and decodes all images: a few milliseconds a sample.
    """
    from teacher_dump.worker import open_preparer

    preparer = open_preparer(worker_settings(planned, settings))
    errors = [error for part in planned.plan.parts for error in part.errors]
    samples = [sample for part in planned.plan.parts for sample in part.samples]
    for sample in tqdm(samples, unit=" samples", desc="prompts", disable=not progress, leave=False):
        try:
            preparer.prepare(sample)
        except SampleRefusedError as refusal:
            errors.append(SampleError(sample.id, str(refusal)))
    return errors


def with_teacher(
    planned: DumpPlan,
    settings: DumpSettings,
    function: Callable[[PartScorer, A], B],
    argument: A,
    *,
    request: SignalRequest | None = None,
) -> B:
    """`function(scorer, argument)` in one actor of a dump, its teacher open. See ray_jobs.with_teacher.

    `request`: the scorer's, where it is to make other signals than the dump's.
    """
    from teacher_dump import ray_jobs

    worker, dump = worker_settings(planned, settings), settings.dump
    with quiet(settings.logs / LOG_FILE):
        return ray_jobs.with_teacher(
            worker if request is None else replace(worker, request=request),
            function,
            argument,
            num_cpus=dump.cpus_per_actor,
            num_gpus=dump.gpus_per_actor,
            address=dump.ray_address,
            logs=settings.logs,
        )


def worker_settings(planned: DumpPlan, settings: DumpSettings) -> WorkerSettings:
    """What each worker of a planned dump is given."""
    from teacher_dump.sight import choose_samples
    from teacher_dump.worker import WorkerSettings

    cache, teacher = settings.cache, settings.teacher
    samples = [sample for part in planned.plan.parts for sample in part.samples]
    return WorkerSettings(
        checkpoint=planned.checkpoint,
        backend=teacher.backend,
        dtype=planned.identity.dtype.split()[0],
        max_length=planned.max_length,
        engine_settings=dict(teacher.settings),
        served=(settings.run / "served").resolve(),
        facts=planned.facts,
        image_root=Path(planned.identity.image_root),
        request=_signal_request(settings, planned.identity),
        cache=_whole_path(cache.path),
        identity=planned.identity,
        families=cache.families,
        append=cache.append,
        zstd_level=cache.zstd_level,
        check_samples=choose_samples(samples, settings.dump.blind_check_samples),
        too_long=settings.data.too_long,
    )


def _whole_path(path: str) -> str:
    """A cache's path for other processes, which may run in another folder."""
    return path if is_url(path) else str(Path(path).resolve())


def _signal_request(settings: DumpSettings, identity: Identity) -> SignalRequest:
    from teacher_dump.scoring import SignalRequest

    cache = settings.cache
    return SignalRequest(
        response=_row_request(cache.response, identity, "response") if "response" in cache.families else None,
        visual=_row_request(cache.visual, identity, "visual") if "visual" in cache.families else None,
        relation_centered=cache.relation.centered if "relation" in cache.families else None,
        relation_pool=cache.relation.pool if "relation" in cache.families else None,
        hidden_limit=_hidden_limit(cache) if "hidden" in cache.families else None,
        sequence="sequence" in cache.families,
        images="images" in cache.families,
        rows_per_chunk=settings.dump.rows_per_chunk,
        measured_parts=frozenset(tail_parts(identity.num_parts)),
    )


def _hidden_limit(cache: CacheSection) -> float:
    return MAX_FLOAT16 if cache.hidden.encoding == "float16" else math.inf


def _asks_teacher(cache: CacheSection) -> bool:
    """False if tokens and images are all that is wanted."""
    return any(family != "images" for family in cache.families)


def _row_request(section: SelectionSection, identity: Identity, family: str) -> RowRequest:
    from teacher_dump.scoring import RowRequest
    from teacher_dump.selection import Mass, Sampled, Selection, Threshold, TopK

    selections: dict[str, Selection] = {
        "threshold": Threshold(identity.selection[family].get("tau", section.tau)),  # a budget may have chosen it
        "topk": TopK(section.k),
        "mass": Mass(section.mass),
        "sampled": Sampled(section.draws),
    }
    return RowRequest(selections[section.method], section.seed, section.temperatures, section.draw_sets)


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
