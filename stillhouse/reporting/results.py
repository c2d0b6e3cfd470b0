"""Reads what the runs of an experiment left in their folders: the list of runs, results, logs, the cache's numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.backends.folder import open_folder
from storage.errors import ConfigError, StillhouseError
from storage.reader.cache import Cache

_ADVICE = "remove it, and run `stillhouse run` or `stillhouse ablate` again"


@dataclass(frozen=True)
class Results:
    """Everything that a report is made of."""

    folder: Path  # of the experiment
    listing: dict[str, Any]  # ablations.json
    runs: dict[str, list[dict[str, Any]]]  # of each run its seeds: summary and evaluation in one, with samples
    teacher: dict[str, Any]  # its evaluation, with samples; empty if it was not evaluated

    @property
    def cache_path(self) -> str | None:
        """The cache that the grid shares."""
        return self.listing.get("cache")


def read_results(folder: Path) -> Results:
    """Everything of the experiment in `folder`; ConfigError when that holds no finished ablation."""
    listing = read_json(folder / "ablations.json")
    if listing is None:
        raise ConfigError(f"{folder}: ablations.json is missing; run `stillhouse run` or `stillhouse ablate` first")
    if not {"runs", "controls"} <= listing.keys():
        raise StillhouseError(f"{folder / 'ablations.json'} is damaged: it has no runs or controls; {_ADVICE}")
    runs: dict[str, list[dict[str, Any]]] = {}
    for entry in listing["runs"]:
        runs.setdefault(entry["name"], []).append(_read_run(Path(entry["folder"]), entry))
    return Results(folder, listing, runs, _read_teacher(listing.get("teacher")))


def _read_run(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    summary, evaluation = read_json(folder / "summary.json"), read_json(folder / "evaluation.json")
    if summary is None or evaluation is None:
        raise ConfigError(f"{folder}: summary.json or evaluation.json is missing; run `stillhouse ablate` again")
    yes_no = evaluation.get("yes_no") or {}
    return {
        **summary,
        **evaluation,
        "hallucination_rate": yes_no.get("hallucination_rate"),
        "unsupported_rate": evaluation.get("unsupported_rate"),
        "seconds": summary["seconds"],
        **{name: entry[name] for name in ("name", "seed", "stage")},
        "inputs": read_json(folder / "inputs.json") or {},
        "train_caches": entry.get("caches"),  # paths; None where an earlier version listed the runs
    }


def _read_teacher(folder: str | None) -> dict[str, Any]:
    evaluation = None if folder is None else read_json(Path(folder) / "evaluation.json")
    if evaluation is None:
        return {}
    summary = read_json(Path(str(folder)) / "summary.json") or {}
    return {"num_parameters": summary.get("num_parameters"), "training_seconds": summary.get("seconds"), **evaluation}


def read_cache(path: str) -> dict[str, Any]:
    """Sizes, rows, errors and fingerprints of a cache."""
    cache = Cache.open(path, families=())
    statistics, identity = cache.statistics(), cache.identity
    num_rows = statistics["num_rows"]
    fields = ("teacher_fingerprint", "tokenizer_fingerprint", "chat_template_fingerprint",
              "image_preprocessing_fingerprint", "plan_fingerprint")  # fmt: skip
    return {
        **statistics,
        "num_rows": sum(num_rows.values()),
        "num_rows_by_family": num_rows,
        "num_samples_by_split": {split: cache.splits.count(split) for split in sorted(set(cache.splits))},
        "teacher": identity.teacher,
        "engine": identity.engine,
        "dtype": identity.dtype,
        "vocab_size": identity.vocab_size,
        "selection": identity.model_dump(mode="json")["selection"],
        "fingerprints": {name: getattr(identity, name) for name in fields}
        | {f"segment_{segment.number}_sha256": segment.sha256 for segment in cache.segments},
    }


def read_dump(path: str) -> dict[str, Any]:
    """What the dump into a cache measured; empty if it left nothing."""
    try:
        return _parse_json(open_folder(path).read("dump.json"), f"{path}/dump.json")
    except FileNotFoundError:
        return {}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The logged steps of one run, oldest first, without an unfinished last line."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [_parse_json(line, path) for line in lines if line]


def read_json(path: Path, advice: str = _ADVICE) -> dict[str, Any] | None:
    """The object in a file, None where there is no file. StillhouseError, with `advice`, for anything else."""
    return _parse_json(path.read_bytes(), path, advice) if path.exists() else None


def _parse_json(text: bytes, path: Path | str, advice: str = _ADVICE) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise StillhouseError(f"{path} is damaged: {error}; {advice}") from error
    if not isinstance(document, dict):
        got = type(document).__name__
        raise StillhouseError(f"{path} is damaged: it holds a {got}, expected an object; {advice}")
    return document
