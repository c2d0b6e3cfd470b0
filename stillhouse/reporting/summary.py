"""Shows results in a terminal: the table at the end of a run, and an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from stillhouse.reporting.text_formats import NO_CATEGORY, format_columns, format_number, format_percent
from storage.backends.disk import format_bytes


def print_summary(folder: Path) -> None:
    """Prints the table of <folder>/report.json and the page's path; the last two lines are the gain and the cost."""
    report = json.loads((folder / "report.json").read_bytes())
    rows = [("run", "exact match", "cross-entropy", "KL to teacher", "seconds", "peak memory")]
    for run in report["runs"]:
        means = [(run.get(name) or {}).get("mean") for name in ("cross_entropy", "kl_to_teacher")]
        cross_entropy, kl_to_teacher = (format_number(mean, ".3f") for mean in means)
        seconds, memory = f"{run['seconds']:.0f}", format_bytes(run["peak_memory_bytes"])
        rows.append((run["name"], format_percent(run["exact_match"]), cross_entropy, kl_to_teacher, seconds, memory))
    if report["teacher"]:
        rows.append(("teacher", format_percent(report["teacher"]["exact_match"]), "", "", "", ""))
    print(f"\n{format_columns(rows)}\n{folder / 'report.html'}\n")
    print("\n".join(filter(None, (report["verdict_scope"], report["verdict"], report["cost_sentence"]))))


def describe_evaluation(path: Path) -> str:
    """An evaluation.json as a few lines of text."""
    evaluation = json.loads(path.read_bytes())
    rows = [("exact match", format_percent(evaluation["exact_match"]))]
    for category, scores in evaluation["by_category"].items():
        rows.append((category or NO_CATEGORY, format_percent(scores["exact_match"])))
    if evaluation.get("unsupported_rate") is not None:
        rows.append(("words without support", f"{format_percent(evaluation['unsupported_rate'])} of answers"))
    hallucination_rate = (evaluation.get("yes_no") or {}).get("hallucination_rate")
    if hallucination_rate is not None:
        rows.append(("yes where it is no", format_percent(hallucination_rate)))
    if evaluation.get("turns"):
        rows.append(("judged", f"{evaluation['turns']} answers: {evaluation['num_answers']}"))
    if evaluation.get("cross_entropy") is not None:
        rows.append(("cross-entropy", f"{evaluation['cross_entropy']:.4f} nats"))
    if evaluation["kl_to_teacher"] is not None:
        rows.append(("KL to the teacher", f"{evaluation['kl_to_teacher']:.4f} nats"))
        rows.append(("top-1 agreement", format_percent(evaluation["top1_agreement"])))
    return f"{format_columns(rows)}\n{path}"
