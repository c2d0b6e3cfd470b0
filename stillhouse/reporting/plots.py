"""Draws the plots of the pages as inline SVG that can be read on light and on dark paper.

Text and axes take the colour of the page's text (`currentColor`); data have tones between light and dark.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stillhouse.reporting.text_formats import NO_CATEGORY

_INK = "#0a0b0c"  # stands for the colour of the page's text
mpl.rcParams["text.parse_math"] = False  # or a category such as "$x^$" of a data set raises a ParseException
mpl.rcParams |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
COLOURS = (
    "#5b84b1", "#9aa7b8", "#d2694c", "#d99a3d", "#6f9f74", "#a878b8", "#3f9c9c", "#b5895f", "#c66a92", "#8f8f4f",
    "#7d7d7d", "#6a6fc4",
)  # fmt: skip
WIDTH = 5.4  # inches; a page shows them at 360 to 580 pixels
MAX_CATEGORIES = 8  # that are drawn
MAX_POINTS = 150  # of a line
LOSS_UNITS = {
    "cross_entropy": "nats", "response": "nats", "visual": "nats", "relation": "1 − cosine", "preference": "",
    "balance": "summed over layers", "router_entropy": "nats", "expert_load_max": "share of a layer's choices",
}  # fmt: skip


def run_colours(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """One colour a run, by its name, the same in every plot."""
    return {run["name"]: COLOURS[index % len(COLOURS)] for index, run in enumerate(runs)}


def draw_accuracy(runs: Sequence[Mapping[str, Any]], teacher: float | None) -> Markup:
    """Exact match by run: a dot for each seed, a bar up to the mean, the teacher as a dashed line."""
    figure, axes = plt.subplots(figsize=(WIDTH, 0.36 * len(runs) + 1.1))
    colours = run_colours(runs)
    for row, run in enumerate(reversed(runs)):
        values = [100 * value for value in run["exact_match_by_seed"].values()]
        colour = colours[run["name"]]
        axes.barh(row, 100 * run["exact_match"]["mean"], color=colour, alpha=0.4, height=0.62)
        axes.scatter(values, [row] * len(values), color=colour, zorder=3, s=20)
    axes.set_yticks(range(len(runs)), [run["name"] for run in reversed(runs)])
    if teacher is not None:
        axes.axvline(100 * teacher, color=_INK, linestyle="--", linewidth=1)
        axes.annotate(
            "teacher", (100 * teacher, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    axes.set_xlim(0, 100)
    axes.set_xlabel("exact match on held-out questions, %")
    return _write_svg(figure, axes, "accuracy")


def draw_categories(runs: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Exact match by question type: a bar for each run, with the standard deviation over seeds; None for many types."""
    categories = sorted({category for run in runs for category in run["by_category"]})
    if len(categories) > MAX_CATEGORIES:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 3))
    width = 0.8 / max(1, len(runs))
    for index, (run, colour) in enumerate(zip(runs, run_colours(runs).values(), strict=True)):
        scores = [run["by_category"].get(category, {"mean": 0, "sd": 0}) for category in categories]
        offset = (index - (len(runs) - 1) / 2) * width
        positions = [group + offset for group in range(len(categories))]
        heights, spreads = [100 * score["mean"] for score in scores], [100 * (score["sd"] or 0) for score in scores]
        axes.bar(
            positions, heights, width, yerr=spreads, color=colour, label=run["name"],
            error_kw={"linewidth": 0.8, "ecolor": _INK},
        )  # fmt: skip
    axes.set_xticks(range(len(categories)), [category or NO_CATEGORY for category in categories])
    axes.set_ylim(0, 100)
    axes.set_ylabel("exact match, %")
    return _write_svg(figure, axes, "categories", legend=True)


def draw_trade(
    runs: Sequence[Mapping[str, Any]], costs: Mapping[str, float | None], label: str, name: str, teacher: float | None
) -> Markup | None:
    """Exact match against what each run costs, with the spread over seeds; None unless two costs are known and differ.

    `costs` by run, `label` of their axis; `name` must differ from those of the page's other plots.
    """
    known = [(run, cost) for run in runs if (cost := costs.get(run["name"])) is not None]
    if len({cost for _, cost in known}) < 2:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 3))
    colours = run_colours(runs)
    for run, cost in known:
        score = run["exact_match"]
        axes.errorbar(
            [cost], [100 * score["mean"]], yerr=100 * (score["sd"] or 0), fmt="o", markersize=7, elinewidth=1.2,
            color=colours[run["name"]], label=run["name"],
        )  # fmt: skip
    if teacher is not None:
        axes.axhline(100 * teacher, color=_INK, linestyle="--", linewidth=1)
        axes.annotate("teacher", (0, 100 * teacher), xycoords=("axes fraction", "data"), xytext=(4, -10),
                      textcoords="offset points", fontsize=9)  # fmt: skip
    _finish_trade(axes, [cost for _, cost in known], label)
    return _write_svg(figure, axes, name, legend=True)


def draw_losses(
    runs: Sequence[Mapping[str, Any]], metrics: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, Markup]:
    """A plot for each loss or statistic that some run logged: its value by optimizer step, a line for each seed.

    A line has at most MAX_POINTS of the logged steps, evenly spaced, the last one included.
    """
    plots = {}
    for loss, unit in LOSS_UNITS.items():
        figure, axes = plt.subplots(figsize=(WIDTH, 2.7))
        num_lines = 0
        for run, colour in zip(runs, run_colours(runs).values(), strict=True):
            for order, seed in enumerate(run["seeds"]):
                logged = [line for line in metrics.get(f"{run['name']}/seed{seed}", ()) if loss in line]
                logged = logged[:: -(-len(logged) // MAX_POINTS) or 1] + logged[-1:]
                if logged:
                    steps, values = [line["step"] for line in logged], [line[loss] for line in logged]
                    label = run["name"] if order == 0 else None
                    axes.plot(steps, values, color=colour, linewidth=1, alpha=0.85, label=label)
                    num_lines += 1
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(loss.replace("_", " ") + (f", {unit}" if unit else ""))
        if num_lines:
            plots[loss] = _write_svg(figure, axes, f"loss-{loss}", legend=True)
        plt.close(figure)
    return plots


def draw_experiments(points: Sequence[tuple[str, float, float, float | None]], label: str, name: str) -> Markup | None:
    """Exact match of experiments against a cost; a point is (experiment, cost, exact match, its spread).

    None unless two costs differ.
    """
    if len({cost for _, cost, _, _ in points}) < 2:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 3))
    for (experiment, cost, mean, spread), colour in zip(points, itertools.cycle(COLOURS), strict=False):
        axes.errorbar(
            [cost], [100 * mean], yerr=100 * (spread or 0), fmt="o", markersize=7, color=colour, label=experiment
        )
    _finish_trade(axes, [cost for _, cost, _, _ in points], label)
    return _write_svg(figure, axes, name, legend=True)


def _finish_trade(axes: Axes, costs: Sequence[float], label: str) -> None:
    """Axes from 0, with room for whole points at both ends."""
    axes.set_xlim(-0.03 * max(costs), 1.08 * max(costs))
    axes.set_ylim(0, 100)
    axes.set_xlabel(label)
    axes.set_ylabel("exact match, %")


def _write_svg(figure: Figure, axes: Axes, name: str, *, legend: bool = False) -> Markup:
    """The figure as an <svg> element. Markup, since matplotlib escapes every text that it writes.

    Ids begin with `name`, or those of two plots of a page would be the same.
    """
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_facecolor("none")
    if legend:
        figure.legend(frameon=False, ncols=3, loc="outside upper left", fontsize=9, handlelength=1.2, columnspacing=1.2)
    figure.set_layout_engine("constrained")
    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stillhouse"}):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    return Markup(re.sub(r"<[^<>]+>", lambda tag: _adapt_tag(tag[0], name), svg))


def _adapt_tag(tag: str, name: str) -> str:
    """A tag with unique ids and the page's colour of text. Texts are no tags, so they stay as they are."""
    tag = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    return tag.replace(_INK, "currentColor")
