"""Draws the report's plots as inline SVG: accuracy by run, accuracy by question type, loss curves."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
from markupsafe import Markup

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stillhouse.reporting.text_formats import NO_CATEGORY

mpl.rcParams["text.parse_math"] = False  # or a category such as "$x^$" of a data set raises a ParseException
COLOURS = ("#4c6a92", "#8aa1bf", "#c8553d", "#e09f3e", "#6b8f71", "#9a6fb0", "#5c5c5c", "#b08968")
LOSS_UNITS = {
    "cross_entropy": "nats", "response": "nats", "visual": "nats", "relation": "1 − cosine", "preference": "",
    "balance": "summed over layers", "router_entropy": "nats", "expert_load_max": "share of a layer's choices",
}  # fmt: skip


def run_colours(runs: list[dict[str, Any]]) -> dict[str, str]:
    """One colour a run, by its name, the same in every plot."""
    return {run["name"]: COLOURS[index % len(COLOURS)] for index, run in enumerate(runs)}


def draw_accuracy(runs: list[dict[str, Any]], teacher: float | None) -> Markup:
    """Exact match by run: a dot for each seed, a bar up to the mean, the teacher as a dashed line."""
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(runs) + 1.2))
    colours = run_colours(runs)
    for row, run in enumerate(reversed(runs)):
        values = [100 * value for value in run["exact_match_by_seed"].values()]
        colour = colours[run["name"]]
        axes.barh(row, 100 * run["exact_match"]["mean"], color=colour, alpha=0.35, height=0.6)
        axes.scatter(values, [row] * len(values), color=colour, zorder=3, s=22)
    axes.set_yticks(range(len(runs)), [run["name"] for run in reversed(runs)])
    if teacher is not None:
        axes.axvline(100 * teacher, color="#222222", linestyle="--", linewidth=1)
        axes.annotate(
            "teacher", (100 * teacher, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    axes.set_xlim(0, 100)
    axes.set_xlabel("exact match on held-out questions, % (a dot is a seed)")
    return _write_svg(figure, axes)


def draw_categories(runs: list[dict[str, Any]]) -> Markup:
    """Exact match by question type: a bar for each run with the standard deviation over seeds."""
    categories = sorted({category for run in runs for category in run["by_category"]})
    figure, axes = plt.subplots(figsize=(7, 3))
    width = 0.8 / max(1, len(runs))
    for index, (run, colour) in enumerate(zip(runs, run_colours(runs).values(), strict=True)):
        scores = [run["by_category"].get(category, {"mean": 0, "sd": 0}) for category in categories]
        offset = (index - (len(runs) - 1) / 2) * width
        positions = [group + offset for group in range(len(categories))]
        heights, spreads = [100 * score["mean"] for score in scores], [100 * (score["sd"] or 0) for score in scores]
        axes.bar(positions, heights, width, yerr=spreads, color=colour, label=run["name"], error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(categories)), [category or NO_CATEGORY for category in categories])
    axes.set_ylim(0, 100)
    axes.set_ylabel("exact match, %")
    figure.legend(frameon=False, ncols=4, loc="outside upper center", fontsize=8)
    return _write_svg(figure, axes)


def draw_losses(runs: list[dict[str, Any]], metrics: dict[str, list[dict[str, float]]]) -> dict[str, Markup]:
    """A plot for each loss or statistic that some run logged: its value by optimizer step, a line for each seed."""
    plots = {}
    for loss, unit in LOSS_UNITS.items():
        figure, axes = plt.subplots(figsize=(7, 2.6))
        num_lines = 0
        for run, colour in zip(runs, run_colours(runs).values(), strict=True):
            for order, seed in enumerate(run["seeds"]):
                logged = [line for line in metrics[f"{run['name']}/seed{seed}"] if loss in line]
                if logged:
                    steps, values = [line["step"] for line in logged], [line[loss] for line in logged]
                    label = run["name"] if order == 0 else None
                    axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.8, label=label)
                    num_lines += 1
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(loss.replace("_", " ") + (f", {unit}" if unit else ""))
        if num_lines:
            axes.legend(frameon=False, fontsize=8, ncols=2)
            plots[loss] = _write_svg(figure, axes)
        plt.close(figure)
    return plots


def _write_svg(figure: Figure, axes: Axes) -> Markup:
    """The figure as an <svg> element. Markup, since matplotlib escapes every text that it writes."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.set_layout_engine("constrained")
    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stillhouse"}):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    return Markup(re.sub(r"^.*?(?=<svg)", "", stream.getvalue(), count=1, flags=re.DOTALL))
