"""Renders report.html by the template beside this file: one self-contained page, no script, nothing fetched."""

from __future__ import annotations

from typing import Any

from stillhouse.reporting.plots import draw_accuracy, draw_categories, draw_losses, run_colours
from stillhouse.reporting.templates import render_template
from stillhouse.reporting.text_formats import NO_CATEGORY
from stillhouse.reporting.verdict import describe_judged_turns


def render_report(report: dict[str, Any], metrics: dict[str, list[dict[str, float]]]) -> str:
    """The page of report.build_report's `report`; `metrics` has the logged steps of a run by "<name>/seed<k>"."""
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
