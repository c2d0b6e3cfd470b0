"""What the terminal shows: the table at the end of a run, an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from stillhouse.reporting.plots import NO_CATEGORY
from stillhouse.reporting.report_page import format_bytes, percent


def print_summary(folder: Path) -> None:
    """Prints the table of <folder>/report.json, its verdict, and where the page lies."""
    report = json.loads((folder / "report.json").read_bytes())
    header = ("run", "exact match", "cross-entropy", "KL to teacher", "seconds", "peak memory")
    rows = [
        (
            run["name"],
            percent(run["exact_match"]),
            "–" if run.get("cross_entropy") is None else f"{run['cross_entropy']['mean']:.3f}",
            "–" if run["kl_to_teacher"] is None else f"{run['kl_to_teacher']['mean']:.3f}",
            f"{run['seconds']:.0f}",
            format_bytes(run["peak_memory_bytes"]),
        )
        for run in report["runs"]
    ]
    if report["teacher"]:
        rows.append(("teacher", f"{100 * report['teacher']['exact_match']:.1f} %", "", "", "", ""))
    print(f"\n{columns([header, *rows])}\n\n{report['verdict']}\n{folder / 'report.html'}")


def describe_evaluation(path: Path) -> str:
    """An evaluation.json as a few lines of text."""
    evaluation = json.loads(path.read_bytes())
    rows = [("exact match", f"{100 * evaluation['exact_match']:.1f} %")]
    rows += [
        (name or NO_CATEGORY, f"{100 * found['exact_match']:.1f} %")
        for name, found in evaluation["by_category"].items()
    ]
    if evaluation.get("unsupported_rate") is not None:
        rows.append(("words without support", f"{100 * evaluation['unsupported_rate']:.1f} % of answers"))
    hallucinated = (evaluation.get("yes_no") or {}).get("hallucination_rate")
    if hallucinated is not None:
        rows.append(("yes where it is no", f"{100 * hallucinated:.1f} %"))
    if evaluation.get("turns"):
        rows.append(("judged", f"{evaluation['turns']} answers: {evaluation['num_answers']}"))
    if evaluation.get("cross_entropy") is not None:
        rows.append(("cross-entropy", f"{evaluation['cross_entropy']:.4f} nats"))
    if evaluation["kl_to_teacher"] is not None:
        rows.append(("KL to the teacher", f"{evaluation['kl_to_teacher']:.4f} nats"))
        rows.append(("top-1 agreement", f"{100 * evaluation['top1_agreement']:.1f} %"))
    return f"{columns(rows)}\n{path}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length in columns: the first to the left, and the others to the right if there are several."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *(cells if len(others) > 1 else others)]).rstrip())
    return "\n".join(lines)
