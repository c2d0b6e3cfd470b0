"""Renders report.html: one self-contained file without scripts, whose sections say what is missing and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.inspection.cache_page import choose_cards, format_share
from stillhouse.inspection.sample_view import chart_bars
from stillhouse.inspection.token_texts import escape_unprintable
from stillhouse.report_page.gallery import Gallery, build_gallery
from stillhouse.report_page.relation_panels import RelationPanels, build_relation_panels
from stillhouse.reporting.cost import format_seconds
from stillhouse.reporting.plots import MAX_POINTS, draw_accuracy, draw_categories, draw_losses, draw_trade, run_colours
from stillhouse.reporting.reproduction import read_experiment_file
from stillhouse.reporting.results import Results
from stillhouse.reporting.templates import render_template
from stillhouse.reporting.text_formats import NO_CATEGORY
from stillhouse.reporting.verdict import describe_judged_turns
from storage.errors import StillhouseError

SECTIONS = {  # by id: also the anchors of the table of contents and the names of the templates
    "setup": "What was run",
    "results": "Results",
    "training": "While training",
    "costs": "What it cost",
    "question-types": "By question type",
    "disagreements": "Where they disagree most",
    "relations": "Relation matrices",
    "routers": "Routers",
    "reproduction": "How to repeat it",
}


@dataclass(frozen=True)
class PageDetails:
    """What a page shows of single samples, which report.json does not hold."""

    gallery: Gallery
    relations: RelationPanels
    experiment_file: str | None = None  # its text


NO_DETAILS = PageDetails(Gallery(note="Not collected."), RelationPanels(note="Not collected."))


def build_page_details(results: Results, report: Mapping[str, Any]) -> PageDetails:
    """Collects samples and matrices; what cannot be read here becomes a note, never an error."""
    try:
        gallery = build_gallery(results, report["best_run"])
    except (StillhouseError, OSError) as error:
        gallery = Gallery(note=f"The samples cannot be shown here: {error}")
    relations = build_relation_panels(results, report["best_run"])
    return PageDetails(gallery, relations, read_experiment_file(report["reproduction"]))


def render_report(
    report: Mapping[str, Any],
    metrics: Mapping[str, Sequence[Mapping[str, float]]],
    details: PageDetails = NO_DETAILS,
) -> str:
    """The page of a report; `metrics` has the logged steps of a run by "<name>/seed<k>"."""
    runs, teacher = report["runs"], report["teacher"].get("exact_match")
    categories = sorted({category for run in runs for category in run["by_category"]})
    is_sparse = any(run["routers"] for run in runs)
    sections = {name: title for name, title in SECTIONS.items() if name != "routers" or is_sparse}
    bytes_read = {run["name"]: run.get("bytes_a_row_read") for run in runs}
    functions = (chart_bars, choose_cards, escape_unprintable, format_seconds, format_share)
    return render_template(
        "reporting/report.html.jinja",
        title=report["name"],
        sections=sections,
        report=report,
        runs=runs,
        teacher=report["teacher"],
        cache=report["cache"],
        dump=report["dump"],
        details=details,
        categories={category: category or NO_CATEGORY for category in categories},
        colours=run_colours(runs),
        judged_turns=describe_judged_turns(runs),
        num_seeds=max((run["num_seeds"] for run in runs), default=0),
        max_points=MAX_POINTS,
        accuracy_plot=draw_accuracy(runs, teacher),
        category_plot=draw_categories(runs),
        loss_plots=draw_losses(runs, metrics),
        seconds_plot=draw_trade(
            runs, {run["name"]: run["seconds"] for run in runs}, "seconds to train one student", "seconds", teacher
        ),
        bytes_plot=draw_trade(runs, bytes_read, "cached bytes read for each row of an answer", "bytes", teacher),
        bytes_read=bytes_read,
        **{function.__name__: function for function in functions},
    )
