"""Compares several experiments by their report.json: a table for the terminal, comparison.json and a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.reporting.cost import format_seconds
from stillhouse.reporting.plots import draw_experiments
from stillhouse.reporting.results import read_json
from stillhouse.reporting.templates import render_template
from stillhouse.reporting.text_formats import format_columns, format_number, format_percent
from stillhouse.reporting.verdict import select_controls
from storage.backends.folder import write_atomically, write_json
from storage.errors import ConfigError, StillhouseError

PAGE = "comparison.html"
_NEEDED = ("name", "runs", "verdict")


def default_output(folders: Sequence[Path]) -> Path:
    """The page's place where none is given: beside the first folder."""
    return folders[0].absolute().parent / PAGE


def compare_experiments(folders: Sequence[Path], page: Path) -> str:
    """Writes the page and, beside it, the same as JSON; returns the table, the verdicts and the page's path.

    ConfigError for a folder without a report, for the same folder twice, or a page that cannot be written.
    """
    experiments = read_experiments(folders)
    if page.is_dir() or page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {page} is not a page's path, expected one such as {page.with_name(PAGE)}")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_json(page.with_suffix(".json"), {"experiments": experiments})
        write_atomically(page, render_comparison(experiments).encode())
    except OSError as error:
        raise ConfigError(f"--output {page}: cannot be written: {error.strerror}") from error
    verdicts = [f"{each['label']}: {each['verdict']}" for each in experiments]
    return "\n".join(["", format_table(experiments), str(page), "", *verdicts])


def read_experiments(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What is compared of each folder's report. ConfigError as `compare_experiments`."""
    twice = [folder for folder, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is named twice; an experiment would be compared with itself")
    reports = []
    for folder in folders:
        advice = f"run `stillhouse report {folder}`, which writes it"
        report = read_json(folder / "report.json", advice)
        if report is None:
            raise ConfigError(f"{folder}: report.json is missing; {advice}")
        missing = [name for name in _NEEDED if name not in report]
        if missing:
            raise StillhouseError(f"{folder / 'report.json'} has no {', '.join(missing)}; {advice}")
        reports.append(report)
    names = Counter(report["name"] for report in reports)
    return [
        _summarise(report, folder, label=report["name"] if names[report["name"]] == 1 else str(folder))
        for report, folder in zip(reports, folders, strict=True)
    ]


def _summarise(report: Mapping[str, Any], folder: Path, *, label: str) -> dict[str, Any]:
    runs = {run["name"]: run for run in report["runs"]}
    best = runs.get(report.get("best_run") or "") or _find_most_accurate(
        [run for run in runs.values() if run["distilled"]]
    )
    controls = select_controls(
        report["runs"], {each["control"] for each in report.get("verdicts", []) if best and each["run"] == best["name"]}
    )
    control = _find_most_accurate([run for name, run in runs.items() if name in controls])
    cache = report.get("cache") or {}
    return {
        "label": label,
        "folder": str(folder),
        "verdict": report["verdict"],
        "cost_sentence": report.get("cost_sentence", ""),
        "teacher": cache.get("teacher"),
        "teacher_exact_match": (report.get("teacher") or {}).get("exact_match"),
        "best_run": best and _describe_run(best),
        "best_control": control and _describe_run(control),
        "num_seeds": max((run["num_seeds"] for run in runs.values()), default=0),
        "num_samples": cache.get("num_samples"),
        "cache_bytes": cache.get("bytes"),
        "bytes_per_row": cache.get("bytes_per_row"),
        "cost": report.get("cost") or {},
        "machine": report.get("machine", ""),
    }


def _find_most_accurate(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return max(runs, key=lambda run: run["exact_match"]["mean"], default=None)


def _describe_run(run: Mapping[str, Any]) -> dict[str, Any]:
    names = ("name", "exact_match", "kl_to_teacher", "cross_entropy", "seconds", "peak_memory_bytes", "num_parameters")
    return {name: run.get(name) for name in names} | {"bytes_a_row_read": run.get("bytes_a_row_read")}


def format_table(experiments: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal."""
    rows = [("experiment", "best run", "exact match", "control", "exact match", "teacher", "bytes a row", "KL", "cost")]
    for each in experiments:
        best, control = each["best_run"] or {}, each["best_control"] or {}
        cached = each["cost"].get("cached_s")
        rows.append(
            (
                each["label"],
                best.get("name", "–"),
                format_percent(best.get("exact_match")),
                control.get("name", "–"),
                format_percent(control.get("exact_match")),
                format_percent(each["teacher_exact_match"]),
                format_number(each["bytes_per_row"], ".1f"),
                format_number(best.get("kl_to_teacher"), ".3f"),
                "–" if cached is None else format_seconds(cached),
            )
        )
    return format_columns(rows)


def render_comparison(experiments: Sequence[Mapping[str, Any]]) -> str:
    """The page as text."""
    scored = [(each, each["best_run"]) for each in experiments if each["best_run"]]
    stored, trained = (
        [
            (each["label"], cost, best["exact_match"]["mean"], best["exact_match"]["sd"])
            for each, best in scored
            for cost in [each["bytes_per_row"] if kind == "bytes" else best["seconds"]]
            if cost is not None
        ]
        for kind in ("bytes", "seconds")
    )
    return render_template(
        "reporting/comparison.html.jinja",
        title=f"{len(experiments)} experiments",
        experiments=experiments,
        machines=sorted({each["machine"] for each in experiments if each["machine"]}),
        bytes_plot=draw_experiments(stored, "bytes a row of the cache", "bytes"),
        seconds_plot=draw_experiments(trained, "seconds to train one student", "seconds"),
        format_seconds=format_seconds,
    )
