"""What a run measured, gathered from its files into report.json and report.html.

Spreads are standard deviations over seeds; differences to a control are taken seed by seed (paired)
and carry a 95 % interval of Student's t.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from stillhouse.reporting.report_page import judged_turns, render_page
from storage.backends.folder import open_folder, write_atomically, write_json
from storage.errors import ConfigError, StillhouseError
from storage.reader.cache import Cache

_AGAIN = "remove it, and run `stillhouse run` or `stillhouse ablate` again"
DISTILLED = ("response", "visual", "relation", "preference")  # parts of a loss that come from the teacher


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
    write_atomically(page, render_page(report, metrics).encode())
    return page


def build_report(folder: Path) -> dict[str, Any]:
    """The report as plain data; `ConfigError` when `folder` holds no finished ablation."""
    listing = _read(folder / "ablations.json")
    if listing is None:
        raise ConfigError(f"{folder}: ablations.json is missing; run `stillhouse run` or `stillhouse ablate` first")
    if not {"runs", "controls"} <= listing.keys():
        raise StillhouseError(f"{folder / 'ablations.json'} is damaged: it has no runs or controls; {_AGAIN}")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for entry in listing["runs"]:
        by_name.setdefault(entry["name"], []).append(_read_run(Path(entry["folder"]), entry))
    runs = [_summarise(name, entries) for name, entries in by_name.items()]
    supported = {run["name"] for run in runs if run["unsupported_rate"] is not None}
    compared = {run["name"] for run in runs if run["kl_to_teacher"] is not None}
    claims = {run["name"] for run in runs if "hallucination_rate" in (run["yes_no"] or {})}
    for run in runs:
        controls = listing["controls"].get(run["name"], [])
        run["paired"] = {control: paired_difference(by_name[run["name"]], by_name[control]) for control in controls}
        run["paired_kl_to_teacher"] = {
            control: paired_difference(by_name[run["name"]], by_name[control], "kl_to_teacher")
            for control in controls
            if {run["name"], control} <= compared
        }
        run["paired_unsupported_rate"] = {
            control: paired_difference(by_name[run["name"]], by_name[control], "unsupported_rate")
            for control in controls
            if {run["name"], control} <= supported
        }
        run["paired_hallucination_rate"] = {
            control: paired_difference(by_name[run["name"]], by_name[control], "hallucination_rate")
            for control in controls
            if {run["name"], control} <= claims
        }
    cache = listing.get("cache")
    return {
        "name": folder.name,
        "machine": describe_machine(),
        "teacher": _read_teacher(listing.get("teacher")),
        "cache": {} if cache is None else _read_cache(cache),
        "dump": {} if cache is None else _read_dump(cache),
        "runs": runs,
        "verdict": verdict(runs),
    }


def mean_and_sd(values: Sequence[float]) -> dict[str, float]:
    """{"mean", "sd"}; sd is the sample's, 0 for a single value."""
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def paired_difference(
    run: list[dict[str, Any]], control: list[dict[str, Any]], measure: str = "exact_match"
) -> dict[str, float | None]:
    """`measure` of `run` less that of `control`, seed by seed: mean, sd, 95 % interval (None for one seed)."""
    of_control = {entry["seed"]: entry[measure] for entry in control}
    differences = [entry[measure] - of_control[entry["seed"]] for entry in run if entry["seed"] in of_control]
    summary: dict[str, float | None] = {**mean_and_sd(differences), "low": None, "high": None}
    if len(differences) > 1:
        half = float(stats.t.ppf(0.975, len(differences) - 1)) * stdev(differences) / len(differences) ** 0.5
        summary |= {"low": fmean(differences) - half, "high": fmean(differences) + half}
    return summary


def verdict(runs: Sequence[dict[str, Any]]) -> str:
    """Which distilled runs beat all of their controls, judged by the paired 95 % intervals, and which are closer to
    the teacher: the one may be true without the other."""
    distilled = [run for run in runs if run["distilled"] and run["paired"]]
    if not distilled:
        return "There is nothing to compare: no distilled run has a control."
    wins = [run for run in distilled if all(_beats(difference) for difference in run["paired"].values())]
    losses = [run for run in distilled if run not in wins]
    parts = []
    if wins:
        parts.append(f"Distillation beat its controls in {_gains(wins)}")
    if losses:
        opening = "but not" if wins else "Distillation did not beat its controls"
        parts.append(f"{opening} by more than the seeds' spread in {_gains(losses)}")
    judged = f"Exact match of {judged_turns(runs)}, paired by seed, with 95 % intervals."
    return f"{', '.join(parts)}. {judged}{_closeness(distilled)}{_unlike(runs)}"


def _closeness(distilled: Sequence[dict[str, Any]]) -> str:
    """Which runs have a lower KL to the teacher than all of their controls, held out; empty where none has both."""
    measured = [run for run in distilled if run.get("paired_kl_to_teacher")]
    lower = [run for run in measured if all(_is_below(each) for each in run["paired_kl_to_teacher"].values())]
    higher = [run for run in measured if any(_is_above(each) for each in run["paired_kl_to_teacher"].values())]
    rest = [run for run in measured if run not in lower and run not in higher]
    parts = [
        f"{verb} in {'; '.join(_nat_gains(run) for run in some)}"
        for verb, some in (("lower", lower), ("higher", higher), ("not shown to differ", rest))
        if some
    ]
    return f" KL to the teacher: {', '.join(parts)}." if parts else ""


def _is_below(difference: dict[str, float | None]) -> bool:
    return difference["high"] is not None and difference["high"] < 0


def _is_above(difference: dict[str, float | None]) -> bool:
    return difference["low"] is not None and difference["low"] > 0


def _nat_gains(run: dict[str, Any]) -> str:
    found = []
    for control, each in run["paired_kl_to_teacher"].items():
        interval = "" if each["low"] is None else f" [{each['low']:+.3f}, {each['high']:+.3f}]"
        found.append(f"{each['mean']:+.3f} nats{interval} to {control}")
    return f"{run['name']} ({', '.join(found)})"


def _unlike(runs: Sequence[dict[str, Any]]) -> str:
    """A warning where runs were not judged on the same samples: each is on those of all its stage's caches."""
    numbers = {run["name"]: run.get("num_held_out") for run in runs}
    if len(set(numbers.values())) < 2:
        return ""
    said = ", ".join(f"{name} {number}" for name, number in numbers.items())
    return f" Beware of differences between runs that were judged on other samples; numbers of samples: {said}."


def _beats(difference: dict[str, float | None]) -> bool:
    return difference["low"] is not None and difference["low"] > 0


def _gains(runs: list[dict[str, Any]]) -> str:
    gains = []
    for run in runs:
        found = ", ".join(f"{_points(difference)} to {control}" for control, difference in run["paired"].items())
        gains.append(f"{run['name']} ({found})")
    return "; ".join(gains)


def _points(difference: dict[str, Any]) -> str:
    if difference["low"] is None:
        return f"{100 * difference['mean']:+.1f} points"
    return f"{100 * difference['mean']:+.1f} points [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"


def _read_run(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    summary, evaluation = _read(folder / "summary.json"), _read(folder / "evaluation.json")
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


def _summarise(name: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    categories = sorted({category for entry in entries for category in entry["by_category"]})
    return {
        "name": name,
        "stage": entries[0]["stage"],
        "distilled": any(part in entries[0]["final"] for part in DISTILLED),
        "steps": entries[0]["steps"],
        "seeds": [entry["seed"] for entry in entries],
        "num_seeds": len(entries),
        "num_held_out": entries[0].get("num_samples"),
        "turns": entries[0].get("turns", "first"),  # earlier evaluations judged first answers alone
        "num_answers": entries[0].get("num_answers", entries[0].get("num_samples")),
        "num_parameters": entries[0]["num_parameters"],
        "num_activated_parameters": entries[0].get("num_activated_parameters", entries[0]["num_parameters"]),
        "exact_match": mean_and_sd([entry["exact_match"] for entry in entries]),
        "exact_match_by_seed": {str(entry["seed"]): entry["exact_match"] for entry in entries},
        "by_category": {
            category: mean_and_sd([entry["by_category"][category]["exact_match"] for entry in entries])
            for category in categories
        },
        "unsupported_rate": _optional(entries, "unsupported_rate"),
        "yes_no": _yes_no([entry.get("yes_no") for entry in entries]),
        "routers": _routers([entry.get("routers") for entry in entries]),
        "cross_entropy": _optional(entries, "cross_entropy"),
        "kl_to_teacher": _optional(entries, "kl_to_teacher"),
        "top1_agreement": _optional(entries, "top1_agreement"),
        "seconds": fmean([entry["seconds"] for entry in entries]),
        "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in entries),
    }


def _yes_no(scores: list[dict[str, Any] | None]) -> dict[str, dict[str, float]] | None:
    """Each score's mean and spread over seeds, None where some seed has none: without yes/no questions all."""
    if None in scores:
        return None
    by_name = {name: [each[name] for each in scores if each is not None] for name in scores[0] or {}}
    return {name: mean_and_sd(values) for name, values in by_name.items() if None not in values}


def _routers(statistics: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Of sparse runs: shares of a layer's experts, the busiest first (seeds number them as they like), and the rest."""
    found = [each for each in statistics if each is not None]
    if not found or len(found) < len(statistics):
        return None
    falling = [[sorted(layer, reverse=True) for layer in each["load"]] for each in found]
    return {
        "load": [[fmean(shares) for shares in zip(*layers, strict=True)] for layers in zip(*falling, strict=True)],
        "load_by_seed": [each["load"] for each in found],
        **{name: mean_and_sd([each[name] for each in found]) for name in ("entropy", "balance", "z")},
        "dropped": sum(each["dropped"] for each in found),
    }


def _optional(entries: list[dict[str, Any]], key: str) -> dict[str, float] | None:
    values = [entry[key] for entry in entries if entry.get(key) is not None]
    return mean_and_sd(values) if len(values) == len(entries) else None


def _read_teacher(folder: str | None) -> dict[str, Any]:
    """The teacher's own evaluation, where there is one; without its samples."""
    evaluation = None if folder is None else _read(Path(folder) / "evaluation.json")
    if evaluation is None:
        return {}
    summary = _read(Path(str(folder)) / "summary.json") or {}
    kept = {key: value for key, value in evaluation.items() if key != "samples"}
    return {"num_parameters": summary.get("num_parameters"), "training_seconds": summary.get("seconds"), **kept}


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
        return _parse(open_folder(path).read("dump.json"), f"{path}/dump.json")
    except FileNotFoundError:
        return {}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The logged steps of one run, oldest first; without a last line that is still being written."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [_parse(line, path) for line in lines if line]


def describe_machine() -> str:
    """Processor, cores and system in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def _read(path: Path) -> dict[str, Any] | None:
    return _parse(path.read_bytes(), path) if path.exists() else None


def _parse(text: bytes, path: Path | str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise StillhouseError(f"{path} is damaged: {error}; {_AGAIN}") from error
    if not isinstance(found, dict):
        raise StillhouseError(f"{path} is damaged: it holds a {type(found).__name__}, expected an object; {_AGAIN}")
    return found
