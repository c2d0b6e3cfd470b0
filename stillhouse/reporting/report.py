"""Builds report.json from the results of an experiment's runs.

Spreads are standard deviations over seeds. `verdicts` compare runs with their controls, paired by seed and question
(pairing.py), with simultaneous intervals (comparisons.py). What a page shows of single samples is not in report.json.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from stillhouse.reporting.comparisons import compare_runs
from stillhouse.reporting.cost import compute_cost, describe_cost, explain_missing_cost
from stillhouse.reporting.pairing import pair_runs
from stillhouse.reporting.reproduction import describe_reproduction
from stillhouse.reporting.results import Results, read_cache, read_dump, read_results
from stillhouse.reporting.run_settings import compute_bytes_a_row, find_differences, list_families
from stillhouse.reporting.text_formats import compute_mean_and_sd
from stillhouse.reporting.verdict import describe_scope, describe_verdict, find_best_run
from storage.errors import StillhouseError

TEACHER_LOSSES = ("response", "visual", "relation", "preference")  # parts of a loss that come from the teacher
OPTIONAL_MEASURES = ("unsupported_rate", "cross_entropy", "kl_to_teacher", "top1_agreement")
COMPARED_METRICS = (  # a family of comparisons each
    "exact_match", "kl_to_teacher", "cross_entropy", "unsupported_rate", "hallucination_rate",
)  # fmt: skip
CATEGORY_MEASURES = ("cross_entropy", "kl_to_teacher")  # that evaluations have by question type, besides exact match


def build_report(folder: Path) -> dict[str, Any]:
    """The report as plain data; `ConfigError` when `folder` holds no finished ablation."""
    return summarise(read_results(folder))


def summarise(results: Results) -> dict[str, Any]:
    """The report as plain data."""
    listing, by_name = results.listing, results.runs
    runs = [_summarise_run(name, entries) for name, entries in by_name.items()]
    comparisons = [
        each
        for metric in COMPARED_METRICS
        for each in compare_runs(metric, pair_runs(by_name, listing["controls"], metric))
    ]
    path = results.cache_path
    cache, dump, missing = _read_shared_cache(path)
    caches = {str(path): cache} if cache else {}
    differences = find_differences(by_name)
    for run in runs:
        entries = by_name[run["name"]]
        run["families"] = list_families(entries[0])
        run["settings"] = differences.get(run["name"], {})
        run["judged_on"] = entries[0].get("caches")
        run["bytes_a_row_read"] = _measure_reading(entries[0], run["families"], caches, path)
    distilled = {run["name"] for run in runs if run["distilled"]}
    entries = [entry for of_run in by_name.values() for entry in of_run]
    cost = compute_cost(entries, distilled, dump, cache.get("num_samples", 0))
    return {
        "name": results.folder.name,
        "machine": describe_machine(),
        "teacher": {key: value for key, value in results.teacher.items() if key not in _BULK},
        "cache": cache,
        "dump": dump,
        "runs": runs,
        "verdicts": [asdict(each) for each in comparisons],
        "verdict": describe_verdict(runs, comparisons),
        "verdict_scope": describe_scope(runs),
        "best_run": find_best_run(runs, comparisons),
        "cost": cost,
        "cost_sentence": describe_cost(cost) or missing or explain_missing_cost(entries, distilled, dump),
        "reproduction": describe_reproduction(results),
    }


def _read_shared_cache(path: str | None) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The facts of a cache and of its dump, both empty without it, and why they cannot be read here."""
    if path is None:
        return {}, {}, ""
    try:
        return read_cache(path), read_dump(path), ""
    except (StillhouseError, OSError) as error:
        return {}, {}, f"What the cache saved is not known, since the cache cannot be read here: {error}"


_BULK = ("samples", "fidelity_by_sample", "relations")  # of single samples: they stay in evaluation.json


def _measure_reading(
    entry: dict[str, Any], families: Sequence[str], caches: dict[str, dict[str, Any]], shared: str | None
) -> float | None:
    """Bytes for each row of an answer that a run reads of its caches; None where these are not known.

    Reads the facts of caches that `caches` lacks and puts them there.
    """
    if not families:
        return 0.0
    paths: list[str] | None = entry["train_caches"]
    if paths is None and shared in caches:  # an earlier version listed none: most runs read the shared cache
        asked = entry["inputs"].get("caches", [])
        paths = [shared] if len(asked) == 1 and _is_cache_of(asked[0], caches[shared]) else None
    if not paths:
        return None
    try:
        facts = [caches.get(path) or caches.setdefault(path, read_cache(path)) for path in paths]
    except (StillhouseError, OSError):  # a cache was removed since, or is on another machine
        return None
    return compute_bytes_a_row(families, facts)


def _is_cache_of(recorded: dict[str, Any], cache: dict[str, Any]) -> bool:
    """Whether a run's recorded cache is this one: the same plan, teacher and, of what the run reads, selections."""
    fingerprints = cache["fingerprints"]
    same = (recorded.get(name) == fingerprints[name] for name in ("plan_fingerprint", "teacher_fingerprint"))
    selection = recorded.get("selection", {}).items()
    return all(same) and all(cache["selection"].get(family) == settings for family, settings in selection)


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
        "measures_by_category": {measure: _average_categories(entries, measure) for measure in CATEGORY_MEASURES},
        "yes_no": _average_yes_no([entry.get("yes_no") for entry in entries]),
        "routers": _average_routers([entry.get("routers") for entry in entries]),
        **{measure: _average_measure(entries, measure) for measure in OPTIONAL_MEASURES},
        "seconds": fmean([entry["seconds"] for entry in entries]),
        "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in entries),
    }


def _average_categories(entries: list[dict[str, Any]], measure: str) -> dict[str, dict[str, float | None]]:
    """Mean and spread of a measure by category, of categories where all seeds have it."""
    scores: dict[str, list[Any]] = {
        category: [(entry["by_category"].get(category) or {}).get(measure) for entry in entries]
        for category in entries[0]["by_category"]
    }
    return {name: compute_mean_and_sd(values) for name, values in scores.items() if None not in values}


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


def describe_machine() -> str:
    """Processor, number of cores and operating system in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"
