"""engine_check.json in the run's folder: how far the engine was from the model, and for which identity that holds.

Whether the check passed is judged when the file is read, by the present limit.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.backends.folder import write_atomically
from storage.field_changes import describe_changes
from storage.identity import TEACHER_FIELDS
from storage.layout.documents import EngineCheckEntry, ErrorSummary
from teacher_dump.engine_check.slice_choice import KINDS
from teacher_dump.planning.dump_plan import DumpPlan
from teacher_dump.settings import DumpSettings
from teacher_dump.teachers.fingerprint import get_engine_version

RECORD_FILE = "engine_check.json"
REFERENCE = "transformers"
ALL = "all"  # the kind of a figure over all samples
Refuser = Literal["data", "engine", "model"]  # data: no prompt can be built of the sample
_SECRETS = ("hf_token",)  # settings of vLLM that no file of ours repeats, and that change no output
_IMAGE_FAMILIES = ("visual", "relation")


class Figure(BaseModel):
    """The distances of all samples of a kind by one measure of one family."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    kind: str  # one of KINDS, or ALL
    summary: ErrorSummary


class RefusedSample(BaseModel):
    """A sample of the slice that was not compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_id: str
    kind: str
    by: Refuser
    reason: str


class EngineCheckRecord(BaseModel):
    """engine_check.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, Any]  # see make_check_identity
    num_samples: dict[str, Annotated[int, Field(ge=0)]]  # that were compared, by kind
    figures: tuple[Figure, ...]
    refused: tuple[RefusedSample, ...] = ()
    engine_device: str
    model_device: str


def make_check_identity(planned: DumpPlan, settings: DumpSettings) -> dict[str, Any]:
    """Returns, as plain JSON, everything that the figures hold for: teacher, engine, model, prompts and pixels."""
    identity = planned.identity.model_dump(mode="json")
    tokens = identity["selection"].get("tokens", {})
    engine_settings = {name: value for name, value in settings.teacher.settings.items() if name not in _SECRETS}
    return {
        **{name: identity[name] for name in TEACHER_FIELDS},
        "engine": identity["engine"],
        "engine_settings": json.loads(json.dumps(engine_settings, default=str)),
        "model": get_engine_version(REFERENCE),
        "tokenisation": tokens.get("tokenisation"),
        "chat_template_arguments": dict(settings.teacher.chat_template_arguments),
        "engine_samples": settings.check.engine_samples,
    }


def write_record(path: Path, record: EngineCheckRecord) -> None:
    """Writes the record atomically."""
    document = record.model_dump(mode="json")
    write_atomically(path, f"{json.dumps(document, indent=1, ensure_ascii=False)}\n".encode())


def read_record(path: Path) -> EngineCheckRecord | None:
    """Reads the record; None if there is none, or if it is damaged."""
    try:
        return EngineCheckRecord.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def explain_staleness(
    record: EngineCheckRecord, identity: Mapping[str, Any], kinds: Collection[str], families: Collection[str]
) -> list[str]:
    """Returns one line for each reason why a record does not hold for this identity and these samples.

    `kinds`: those of the samples of the dump; `families`: those of the dump.
    """
    lines = describe_changes(record.identity, dict(identity))
    unseen = [kind for kind in KINDS if kind in kinds and not record.num_samples.get(kind)]
    refused = {one.kind for one in record.refused}
    lines += [f"samples with {_name_kind(kind)}: the check scored none" for kind in unseen if kind not in refused]
    measured = {figure.family for figure in record.figures}
    if "relation" in families and "visual" in measured and "relation" not in measured:
        lines.append("cache.families: now has relation, which the check did not compare")
    return lines


def explain_failure(
    record: EngineCheckRecord, kinds: Collection[str], families: Collection[str], *, limit: float
) -> list[str]:
    """Returns one line for each difference beyond the limit; empty if the engine says what the model says.

    The mean KL of each kind of samples counts: one kind may be wrong where the others are right, and single rows
    differ by more in low precision. Visual rows count where the dump has them, or relation matrices made of them.
    """
    judged = ["response"] + ["visual"] * bool(set(families) & set(_IMAGE_FAMILIES))
    if not sum(record.num_samples.values()):
        first = f"; {record.refused[0].sample_id}: {record.refused[0].reason}" if record.refused else ""
        return [f"none of the chosen samples could be compared{first}; raise check.engine_samples"]
    lines = []
    for figure in record.figures:
        summary = figure.summary
        if figure.family in judged and summary.measure == "kl" and figure.kind in kinds and summary.mean > limit:
            lines.append(
                f"{figure.family} rows of samples with {_name_kind(figure.kind)}: KL(model || engine) is "
                f"{summary.mean:.3g} nats a row in the mean of {summary.count:,} rows (largest {summary.max:.3g}); "
                f"check.max_engine_kl allows {limit:g}"
            )
    for kind in kinds:
        refused = [one for one in record.refused if one.kind == kind and one.by != "data"]
        if refused and not record.num_samples.get(kind):
            lines.append(
                f"samples with {_name_kind(kind)}: none of {len(refused)} could be compared; "
                f"{refused[0].sample_id}, by the {refused[0].by}: {refused[0].reason}"
            )
    return lines


def make_manifest_entry(record: EngineCheckRecord | None, *, limit: float, is_on: bool) -> EngineCheckEntry:
    """Returns what a manifest says of the check. `is_on` False: dump.engine_check is false."""
    state = "passed" if is_on else "off"
    if record is None:
        return EngineCheckEntry(state=state)
    whole = [figure for figure in record.figures if figure.kind == ALL]
    return EngineCheckEntry(
        state=state,
        engine=str(record.identity["engine"]),
        model=str(record.identity["model"]),
        dtype=str(record.identity["dtype"]),
        num_samples=sum(record.num_samples.values()),
        max_kl=limit,
        families={
            family: tuple(figure.summary for figure in whole if figure.family == family)
            for family in dict.fromkeys(figure.family for figure in whole)
        },
    )


def format_record(record: EngineCheckRecord) -> list[str]:
    """Formats the figures for a terminal: one line for each family, measure and kind of samples."""
    head = ("family", "measure", "samples with", "rows", "mean", "p99", "max")
    rows: list[tuple[str, ...]] = [head]
    for figure in record.figures:
        one, kind = figure.summary, "anything" if figure.kind == ALL else _name_kind(figure.kind)
        numbers = (f"{one.mean:.2e}", f"{one.p99:.2e}", f"{one.max:.2e}")
        rows.append((figure.family, one.measure, kind, f"{one.count:,}", *numbers))
    lines = _align(rows)
    lines += [f"not compared: {one.sample_id}, by the {one.by}: {one.reason}" for one in record.refused[:10]]
    return lines


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _name_kind(kind: str) -> str:
    return "text alone" if kind == "text" else kind
