"""The report's pictures, each as a string of inline SVG: accuracy by run, by question type, loss curves."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NO_CATEGORY = "no category"  # of samples whose source names none
COLOURS = ("#4c6a92", "#8aa1bf", "#c8553d", "#e09f3e", "#6b8f71", "#9a6fb0", "#5c5c5c", "#b08968")
LOSSES = {  # and the unit of each
    "cross_entropy": "nats",
    "response": "nats",
    "visual": "nats",
    "relation": "1 − cosine",
    "preference": "",
    "balance": "summed over layers",
    "router_entropy": "nats",
    "expert_load_max": "share of a layer's choices",
}


def colour_of(runs: list[dict[str, Any]]) -> dict[str, str]:
    """One colour a run, the same in every picture."""
    return {run["name"]: COLOURS[index % len(COLOURS)] for index, run in enumerate(runs)}


def accuracy_plot(runs: list[dict[str, Any]], teacher: float | None) -> str:
    """Exact match a run: a dot a seed, a bar at the mean, the teacher as a dashed line."""
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(runs) + 1.2))
    colours = colour_of(runs)
    for row, run in enumerate(reversed(runs)):
        values = [100 * value for value in run["exact_match_by_seed"].values()]
        axes.barh(row, 100 * run["exact_match"]["mean"], color=colours[run["name"]], alpha=0.35, height=0.6)
        axes.scatter(values, [row] * len(values), color=colours[run["name"]], zorder=3, s=22)
    axes.set_yticks(range(len(runs)), [run["name"] for run in reversed(runs)])
    if teacher is not None:
        axes.axvline(100 * teacher, color="#222222", linestyle="--", linewidth=1)
        axes.annotate(
            "teacher", (100 * teacher, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    axes.set_xlim(0, 100)
    axes.set_xlabel("exact match on held-out questions, % (a dot is a seed)")
    return _svg(figure, axes)


def category_plot(runs: list[dict[str, Any]]) -> str:
    """Exact match by question type: grouped bars with the seeds' standard deviation."""
    categories = sorted({category for run in runs for category in run["by_category"]})
    figure, axes = plt.subplots(figsize=(7, 3))
    width = 0.8 / max(1, len(runs))
    for index, (run, colour) in enumerate(zip(runs, colour_of(runs).values(), strict=True)):
        found = [run["by_category"].get(category, {"mean": 0, "sd": 0}) for category in categories]
        places = [place + (index - (len(runs) - 1) / 2) * width for place in range(len(categories))]
        heights, spreads = [100 * item["mean"] for item in found], [100 * item["sd"] for item in found]
        axes.bar(places, heights, width, yerr=spreads, color=colour, label=run["name"], error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(categories)), [category or NO_CATEGORY for category in categories])
    axes.set_ylim(0, 100)
    axes.set_ylabel("exact match, %")
    figure.legend(frameon=False, ncols=4, loc="outside upper center", fontsize=8)
    return _svg(figure, axes)


def loss_plots(runs: list[dict[str, Any]], metrics: dict[str, list[dict[str, float]]]) -> dict[str, str]:
    """One picture a loss or statistic that some run logged: its value by optimizer step, a thin line a seed."""
    pictures = {}
    for loss, unit in LOSSES.items():
        figure, axes = plt.subplots(figsize=(7, 2.6))
        num_lines = 0
        for run, colour in zip(runs, colour_of(runs).values(), strict=True):
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
            pictures[loss] = _svg(figure, axes)
        plt.close(figure)
    return pictures


def _svg(figure: Figure, axes: Axes) -> str:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.set_layout_engine("constrained")
    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stillhouse"}):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    text = stream.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", text, count=1, flags=re.DOTALL)
