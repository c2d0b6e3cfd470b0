"""The folder of generated answers: its name, its files, and the questions without an answer.

```
<run>/answers/<key>/part-00000.jsonl   the answered samples of a part of the questions' plan, written whole
<run>/answers/<key>/<split>.jsonl      the data set that the dump reads in place of data.sources
<run>/answers/<key>/answers.json       written last: the splits, the sampling, whether the dump keeps the parts
<run>/answers/<key>/later.jsonl        the results of failed questions that were asked again
<run>/answers/<key>/again/             unfinished work of asking again, until it is in later.jsonl
```

The key is a hash of questions, tokenisation, sampling, and the teacher or model that answers. The first three files
never change, so the plan of the dump over them stays the same; a retry also reads later.jsonl.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from storage.backends.folder import write_atomically
from storage.identity import Identity
from storage.layout.documents import ErrorEntry
from teacher_dump.config import SamplingSection, SourceSection
from teacher_dump.data.unread_fields import IGNORABLE
from teacher_dump.settings import DumpSettings

ANSWERS_FOLDER = "answers"  # of a run
DONE_FILE, LATER_FILE, AGAIN_FOLDER = "answers.json", "later.jsonl", "again"
_PART = "part-{:05d}.jsonl"


def compute_answers_key(questions: Identity, sampling: SamplingSection) -> str:
    """Computes the name of the answers' folder for a plan of questions.

    Where another model answers, it is described in the selection, and the teacher's weights do not matter.
    """
    ignored = {"selection", "image_root", "teacher"}
    if "responses" in questions.selection["tokens"]:
        ignored |= {"teacher_fingerprint", "dtype", "engine"}
    identity = questions.model_dump(mode="json", exclude=ignored)
    key = json.dumps([identity, questions.selection["tokens"], sampling.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def resolve_answers_folder(settings: DumpSettings, questions: Identity) -> Path:
    """Returns the absolute folder of the answers to a plan of questions."""
    key = compute_answers_key(questions, settings.data.sampling)
    return (settings.run / ANSWERS_FOLDER / key).resolve()


def load_answered_settings(settings: DumpSettings, questions: Identity) -> DumpSettings | None:
    """Returns settings whose sources are the generated answers; None if answers are missing.

    `questions`: the identity of the plan of `settings`.
    """
    folder = resolve_answers_folder(settings, questions)
    try:
        done = json.loads((folder / DONE_FILE).read_bytes())
    except FileNotFoundError:
        return None
    sources = tuple(
        SourceSection(
            path=str(folder / name),
            format="json",
            images=questions.image_root,
            split=split,
            ignore=IGNORABLE,  # the data's own sources have refused everything that they do not ignore
        )
        for split, name in done["splits"]
    )
    data = settings.data.model_copy(update={"sources": sources, "responses": "dataset"})
    responses = questions.selection["tokens"].get("responses", "teacher")
    selection = {"responses": responses, **done["sampling"]}
    return replace(settings, data=data, answer_selection=selection, answers=folder)


def read_question_parts(folder: Path) -> list[list[str]] | None:
    """Returns the sample ids of each part of the questions, which a dump over their answers keeps.

    None for answers of an earlier version, whose dump splits the answered samples anew.
    """
    if not json.loads((folder / DONE_FILE).read_bytes()).get("keeps_parts"):
        return None
    return [
        [row["id"] for row in read_json_lines(path)] for path in sorted(folder.glob("part-*.jsonl"), key=_get_number)
    ]


def _get_number(part: Path) -> int:
    return int(part.stem.removeprefix("part-"))


def get_part_path(folder: Path, number: int) -> Path:
    """Returns the path of a part's answers."""
    return folder / _PART.format(number)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file of JSON lines; nothing if there is no such file."""
    if path.is_file():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def write_json_lines(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, atomically."""
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, text.encode())


def read_refusals(folder: Path) -> dict[int, tuple[ErrorEntry, ...]]:
    """Returns the questions without an answer, and why the first attempt gave none, by part."""
    refusals: dict[int, tuple[ErrorEntry, ...]] = {}
    for path in sorted(folder.glob("part-*.jsonl")):
        rows = [row for row in read_json_lines(path) if "refused" in row]
        if rows:
            refusals[_get_number(path)] = tuple(ErrorEntry(sample_id=row["id"], reason=row["refused"]) for row in rows)
    return refusals
