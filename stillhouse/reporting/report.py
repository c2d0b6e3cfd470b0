"""Collects the results of an experiment from the files of its runs, and writes report.json and report.html.

Spreads are standard deviations over seeds. `verdicts` compare runs with their controls, paired by seed and question,
with simultaneous intervals (comparisons.py).
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.reporting.comparisons import compare_runs
from stillhouse.reporting.cost import compute_cost, describe_cost
from stillhouse.reporting.plots import draw_accuracy, draw_categories, draw_losses, run_colours
from stillhouse.reporting.templates import render_template
from stillhouse.reporting.text_formats import NO_CATEGORY, compute_mean_and_sd
from stillhouse.reporting.verdict import describe_judged_turns, describe_verdict
from storage.backends.folder import open_folder, write_atomically, write_json
from storage.errors import ConfigError, StillhouseError
from storage.reader.cache import Cache

_ADVICE = "remove it, and run `stillhouse run` or `stillhouse ablate` again"
TEACHER_LOSSES = ("response", "visual", "relation", "preference")  # parts of a loss that come from the teacher
OPTIONAL_MEASURES = ("unsupported_rate", "cross_entropy", "kl_to_teacher", "top1_agreement")
COMPARED_METRICS = ("exact_match", "kl_to_teacher", "unsupported_rate", "hallucination_rate")  # a family each


def write_report(folder: Path) -> Path:
    """Writes <folder>/report.json and report.html and returns the latter's path."""
    report = build_report(folder)
    write_json(folder / "report.json", report)
    metrics = {
        f"{run['name']}/seed{seed}": read_metrics(folder / "models" / run["name"] / f"seed{seed}")
        for run in report["runs"]
        for seed in run["seeds"]
    }
    page = folder / "report.html"
    write_atomically(page, render_report(report, metrics).encode())
    return page


def render_report(report: dict[str, Any], metrics: dict[str, list[dict[str, float]]]) -> str:
    """The page of a report; `metrics` has the logged steps of a run by "<name>/seed<k>"."""
    runs = report["runs"]
    categories = sorted({category for run in runs for category in run["by_category"]})
    return render_template(
        "reporting/report.html.jinja",
        report=report,
        categories={category: category or NO_CATEGORY for category in categories},
        colours=run_colours(runs),
        judged_turns=describe_judged_turns(runs),
        num_seeds=max((run["num_seeds"] for run in runs), default=0),
        accuracy_plot=draw_accuracy(runs, report["teacher"].get("exact_match")),
        category_plot=draw_categories(runs),
        loss_plots=draw_losses(runs, metrics),
    )


def build_report(folder: Path) -> dict[str, Any]:
    """The report as plain data; `ConfigError` when `folder` holds no finished ablation."""
    listing = _read_json(folder / "ablations.json")
    if listing is None:
        raise ConfigError(f"{folder}: ablations.json is missing; run `stillhouse run` or `stillhouse ablate` first")
    if not {"runs", "controls"} <= listing.keys():
        raise StillhouseError(f"{folder / 'ablations.json'} is damaged: it has no runs or controls; {_ADVICE}")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for entry in listing["runs"]:
        by_name.setdefault(entry["name"], []).append(_read_run(Path(entry["folder"]), entry))
    runs = [_summarise_run(name, entries) for name, entries in by_name.items()]
    comparisons = [
        each
        for metric in COMPARED_METRICS
        for each in compare_runs(metric, _pair_runs(by_name, listing["controls"], metric))
    ]
    path = listing.get("cache")
    cache, dump = ({}, {}) if path is None else (_read_cache(path), _read_dump(path))
    distilled = {run["name"] for run in runs if run["distilled"]}
    entries = [{**entry, "name": name} for name, of_run in by_name.items() for entry in of_run]
    cost = compute_cost(entries, distilled, dump, cache.get("num_samples", 0))
    return {
        "name": folder.name,
        "machine": describe_machine(),
        "teacher": _read_teacher(listing.get("teacher")),
        "cache": cache,
        "dump": dump,
        "runs": runs,
        "verdicts": [asdict(each) for each in comparisons],
        "verdict": describe_verdict(runs, comparisons),
        "cost": cost,
        "cost_sentence": describe_cost(cost),
    }


def _pair_runs(
    by_name: dict[str, list[dict[str, Any]]], controls: dict[str, list[str]], metric: str
) -> dict[tuple[str, str], NDArray[np.float64]]:
    """A metric's differences (s, q) of each run to each control that has the metric and a seed in common with it."""
    pairs = {}
    for name, others in controls.items():
        for control in others:
            partners = {entry["seed"]: entry for entry in by_name[control]}
            both = [(entry, partners[entry["seed"]]) for entry in by_name[name] if entry["seed"] in partners]
            if both and all(entry.get(metric) is not None for pair in both for entry in pair):
                pairs[name, control] = np.array(_subtract_controls(both, metric))
    return pairs


def _subtract_controls(both: list[tuple[dict[str, Any], dict[str, Any]]], metric: str) -> list[list[float]]:
    """Differences of (run, control) of each seed: by question if all answered the same ones, else of the means."""
    answers = [[_list_answers(entry, metric) for entry in pair] for pair in both]
    questions = answers[0][0].keys()
    if questions and all(each.keys() == questions for pair in answers for each in pair):
        return [[run[question] - control[question] for question in questions] for run, control in answers]
    return [[run[metric] - control[metric]] for run, control in both]


def _list_answers(entry: dict[str, Any], metric: str) -> dict[tuple[str, int], float]:
    """1 or 0 by question (sample and turn) for exact match; empty for other metrics."""
    samples = entry.get("samples", []) if metric == "exact_match" else []
    return {(sample["sample_id"], sample.get("turn", 0)): float(sample["correct"]) for sample in samples}


def _read_run(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    summary, evaluation = _read_json(folder / "summary.json"), _read_json(folder / "evaluation.json")
    if summary is None or evaluation is None:
        raise ConfigError(f"{folder}: summary.json or evaluation.json is missing; run `stillhouse ablate` again")
    yes_no = evaluation.get("yes_no") or {}
    return {
        **summary,
        **evaluation,
        "hallucination_rate": yes_no.get("hallucination_rate"),
        "unsupported_rate": evaluation.get("unsupported_rate"),
        "seconds": summary["seconds"],
        "seed": entry["seed"],
        "stage": entry["stage"],
    }


def _summarise_run(name: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    categories = sorted({category for entry in entries for category in entry["by_category"]})
    return {
        "name": name,
        "stage": entries[0]["stage"],
        "distilled": any(loss in entries[0]["final"] for loss in TEACHER_LOSSES),
        "steps": entries[0]["steps"],
        "seeds": [entry["seed"] for entry in entries],
        "num_seeds": len(entries),
        "num_held_out": entries[0].get("num_samples"),
        "turns": entries[0].get("turns", "first"),  # earlier evaluations judged first answers alone
        "num_answers": entries[0].get("num_answers", entries[0].get("num_samples")),
        "num_parameters": entries[0]["num_parameters"],
        "num_activated_parameters": entries[0].get("num_activated_parameters", entries[0]["num_parameters"]),
        "exact_match": compute_mean_and_sd([entry["exact_match"] for entry in entries]),
        "exact_match_by_seed": {str(entry["seed"]): entry["exact_match"] for entry in entries},
        "by_category": {
            category: compute_mean_and_sd([entry["by_category"][category]["exact_match"] for entry in entries])
            for category in categories
        },
        "yes_no": _average_yes_no([entry.get("yes_no") for entry in entries]),
        "routers": _average_routers([entry.get("routers") for entry in entries]),
        **{measure: _average_measure(entries, measure) for measure in OPTIONAL_MEASURES},
        "seconds": fmean([entry["seconds"] for entry in entries]),
        "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in entries),
    }


def _average_yes_no(scores: list[dict[str, Any] | None]) -> dict[str, dict[str, float | None]] | None:
    """The mean and spread of each score that all seeds have; None if a seed was asked no yes/no questions."""
    measured = [score for score in scores if score is not None]
    if len(measured) < len(scores):
        return None
    by_name = {name: [score[name] for score in measured] for name in measured[0]}
    return {name: compute_mean_and_sd(values) for name, values in by_name.items() if None not in values}


def _average_routers(statistics: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Router statistics of a sparse run over its seeds; None for a dense run.

    The experts of a layer are sorted by load, the busiest first, since each seed numbers them differently.
    """
    measured = [seed for seed in statistics if seed is not None]
    if not measured or len(measured) < len(statistics):
        return None
    by_load = [[sorted(layer, reverse=True) for layer in seed["load"]] for seed in measured]
    return {
        "load": [[fmean(shares) for shares in zip(*layers, strict=True)] for layers in zip(*by_load, strict=True)],
        "load_by_seed": [seed["load"] for seed in measured],
        **{name: compute_mean_and_sd([seed[name] for seed in measured]) for name in ("entropy", "balance", "z")},
        "dropped": sum(seed["dropped"] for seed in measured),
    }


def _average_measure(entries: list[dict[str, Any]], measure: str) -> dict[str, float | None] | None:
    """Mean and spread of a measure that all seeds have; None if one lacks it."""
    values = [entry[measure] for entry in entries if entry.get(measure) is not None]
    return compute_mean_and_sd(values) if len(values) == len(entries) else None


def _read_teacher(folder: str | None) -> dict[str, Any]:
    """The teacher's evaluation without its samples; empty if it was not evaluated."""
    evaluation = None if folder is None else _read_json(Path(folder) / "evaluation.json")
    if evaluation is None:
        return {}
    summary = _read_json(Path(str(folder)) / "summary.json") or {}
    scores = {key: value for key, value in evaluation.items() if key != "samples"}
    return {"num_parameters": summary.get("num_parameters"), "training_seconds": summary.get("seconds"), **scores}


def _read_cache(path: str) -> dict[str, Any]:
    cache = Cache.open(path, families=())
    statistics = cache.statistics()
    num_rows = statistics["num_rows"]
    return {
        **statistics,
        "num_rows": sum(num_rows.values()),
        "num_rows_by_family": num_rows,
        "teacher": cache.identity.teacher,
        "engine": cache.identity.engine,
    }


def _read_dump(path: str) -> dict[str, Any]:
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


def describe_machine() -> str:
    """Processor, number of cores and operating system in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def _read_json(path: Path) -> dict[str, Any] | None:
    return _parse_json(path.read_bytes(), path) if path.exists() else None


def _parse_json(text: bytes, path: Path | str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise StillhouseError(f"{path} is damaged: {error}; {_ADVICE}") from error
    if not isinstance(document, dict):
        got = type(document).__name__
        raise StillhouseError(f"{path} is damaged: it holds a {got}, expected an object; {_ADVICE}")
    return document
