"""Tables and figures of results in README.md and docs/, made from the reports in docs/results/.

    python -m docs.make_tables                                     # writes them
    python -m docs.make_tables --check                             # exits with 1 if one is not what its report says
    python -m docs.make_tables --add runs/digits/report.json       # takes a report over, then writes

A table stands between `<!-- table: REPORT KIND -->` and `<!-- end of table -->`; REPORT may be two names with a comma,
whose rows are then one table. What a run was trained with is told by
docs/results/descriptions.yaml.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from stillhouse.reporting.text_formats import format_number

DOCS = Path(__file__).parent
REPORTS = DOCS / "results"
PAGES = (DOCS.parent / "README.md", DOCS / "results.md", *sorted(DOCS.parent.glob("examples/*/*.md")))
FIGURES = {"digits": DOCS / "assets" / "digits.svg"}  # by the name of their report
TEACHER = "*teacher*"
_TABLE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
Report = dict[str, Any]


def make_table(reports: Sequence[Report], kind: str) -> str:
    """One table in Markdown, with the rows of each report. KeyError for a kind that does not exist."""
    tables = [_KINDS[kind](report) for report in reports]
    if any(table[0] != tables[0][0] for table in tables):
        raise ValueError(f"the reports {[each['name'] for each in reports]} have other columns of the kind {kind!r}")
    of_runs = [row for table in tables for row in table[2:] if row[0] != TEACHER]
    rows = [*tables[0][:2], *of_runs, *(row for row in tables[0] if row[0] == TEACHER)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _list_runs(report: Report) -> list[list[str]]:
    """Every run with steps, accuracy, closeness to the teacher and seconds."""
    header = ["run", "trained with", "steps", "exact match, %", "held-out KL to the teacher", "seconds"]
    rows = [
        [
            f"`{run['name']}`",
            _describe(report, run["name"]),
            f"{run['steps']:,}",
            _percent(run["exact_match"]),
            format_number(run["kl_to_teacher"], ".3f"),
            f"{run['seconds']:.0f}",
        ]
        for run in report["runs"]
    ]
    teacher = report["teacher"]
    seconds = "" if teacher.get("training_seconds") is None else f"{teacher['training_seconds']:.0f}"
    last = [
        TEACHER,
        "",
        "",
        _percent(teacher["exact_match"]),
        format_number(teacher["kl_to_teacher"], ".3f"),
        seconds,
    ]
    return [header, ["---"] * len(header), *rows, last]


def _list_short(report: Report) -> list[list[str]]:
    """As `_list_runs`, without steps and seconds."""
    return [[row[0], row[1], row[3], row[4]] for row in _list_runs(report)]


def _list_categories(report: Report) -> list[list[str]]:
    names = sorted({name for run in report["runs"] for name in run["by_category"]})
    header = ["by question type, %", *names]
    rows = [[f"`{run['name']}`", *(_percent(run["by_category"].get(name)) for name in names)] for run in report["runs"]]
    of_teacher = report["teacher"]["by_category"]
    last = [TEACHER, *(_percent((of_teacher.get(name) or {}).get("exact_match")) for name in names)]
    return [header, ["---"] * len(header), *rows, last]


def _list_measure(report: Report, *, measure: str, title: str) -> list[list[str]]:
    """One measure in nats a token by category, as `by_category` names it in a report."""
    names = sorted({name for run in report["runs"] for name in run["measures_by_category"][measure]})
    rows = [
        [f"`{run['name']}`", *(_format_nats(run["measures_by_category"][measure].get(name)) for name in names)]
        for run in report["runs"]
    ]
    of_teacher = report["teacher"]["by_category"]
    last = [TEACHER, *(_format_nats((of_teacher.get(name) or {}).get(measure)) for name in names)]
    return [[title, *names], ["---"] * (1 + len(names)), *rows, last]


def _list_differences(report: Report) -> list[list[str]]:
    header = [
        "run",
        "over",
        "points of exact match, 95 % interval",
        "adjusted p of it",
        "KL to the teacher, 95 % interval",
    ]
    by_pair = {(each["run"], each["control"], each["metric"]): each for each in report["verdicts"]}
    rows, last = [], None
    for (run, control, metric), each in by_pair.items():
        if metric != "exact_match":
            continue
        points, nats = _interval(each, 100, 1), _interval(by_pair.get((run, control, "kl_to_teacher")), 1, 3)
        rows.append(["" if run == last else f"`{run}`", f"`{control}`", points, _format_p(each["adjusted_p"]), nats])
        last = run
    return [header, ["---"] * len(header), *rows]


def _list_likelihood_differences(report: Report) -> list[list[str]]:
    header = ["run", "over", "held-out negative log-likelihood, nats a token, 95 % interval", "adjusted p"]
    rows = [
        [f"`{each['run']}`", f"`{each['control']}`", _interval(each, 1, 3), _format_p(each["adjusted_p"])]
        for each in report["verdicts"]
        if each["metric"] == "cross_entropy"
    ]
    return [header, ["---"] * len(header), *rows]


_KINDS: dict[str, Callable[[Report], list[list[str]]]] = {
    "runs": _list_runs,
    "short": _list_short,
    "categories": _list_categories,
    "likelihood": partial(_list_measure, measure="cross_entropy", title="held-out negative log-likelihood, nats"),
    "kl": partial(_list_measure, measure="kl_to_teacher", title="held-out KL to the teacher, nats"),
    "differences": _list_differences,
    "likelihood_differences": _list_likelihood_differences,
}


def make_page(text: str) -> str:
    """The page with its tables and sentences as the committed reports say."""

    def fill(match: re.Match[str]) -> str:
        start, names, kind, end = match.groups()
        reports = [read_report(name) for name in names.split(",")]
        if kind == "verdict":
            return f"{start}{reports[0]['verdict']} {reports[0]['cost_sentence']}\n{end}"
        return start + make_table(reports, kind) + end

    return _TABLE.sub(fill, text)


def read_report(name: str) -> Report:
    """The committed report `name`."""
    return json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8"))


def make_figure(report: Report) -> str:
    """Exact match by run as SVG: a bar up to the mean with its standard deviation, the teacher as a line."""
    runs, teacher = report["runs"], 100 * report["teacher"]["exact_match"]
    means = {run["name"]: (100 * run["exact_match"]["mean"], 100 * (run["exact_match"]["sd"] or 0)) for run in runs}
    seeds = max(run["num_seeds"] for run in runs)

    def place(value: float) -> str:
        return f"{170 + value / 100 * 560:g}"

    bottom = 60 + 44 * len(runs)
    listed = "; ".join(f"{name}: {mean:.1f} % ± {sd:.1f}" for name, (mean, sd) in means.items())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {bottom + 46}" role="img" '
        'aria-labelledby="title description">',
        f'  <title id="title">Exact match of the experiment {report["name"]}</title>',
        f'  <desc id="description">{listed}; teacher: {teacher:.1f} %. Means and standard deviations over {seeds} '
        "seeds.</desc>",
        "  <style>",
        "    .card { fill: #fbfaf7; stroke: #d8d4c8; }",
        "    .grid { stroke: #ddd9ce; }",
        "    .bar { fill: #8aa1bf; } .taught { fill: #c8553d; }",
        "    .error { stroke: #22221f; stroke-width: 2; }",
        "    .teacher { stroke: #22221f; stroke-width: 2; stroke-dasharray: 6 5; }",
        '    text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #22221f; }',
        "    .name { font-size: 18px; font-weight: 600; } .line { font-size: 16px; text-anchor: end; }",
        "    .axis { font-size: 16px; text-anchor: middle; }",
        "  </style>",
        f'  <rect class="card" x="1" y="1" width="758" height="{bottom + 44}" rx="14"/>',
        f'  <text class="name" x="22" y="32">Exact match, %, mean ± sd over {seeds} seeds; red: distilled</text>',
    ]
    for value in range(0, 101, 20):
        lines.append(f'  <path class="grid" d="M{place(value)},48 V{bottom}"/>')
        lines.append(f'  <text class="axis" x="{place(value)}" y="{bottom + 24}">{value}</text>')
    for number, run in enumerate(runs):
        (mean, sd), y = means[run["name"]], 66 + 44 * number
        kind = "bar taught" if run["distilled"] else "bar"
        width = float(place(mean)) - float(place(0))
        lines.append(f'  <text class="line" x="160" y="{y + 19}">{run["name"]}</text>')
        lines.append(f'  <rect class="{kind}" x="{place(0)}" y="{y}" width="{width:g}" height="28" rx="3"/>')
        lines.append(f'  <path class="error" d="M{place(mean - sd)},{y + 14} H{place(min(100, mean + sd))}"/>')
    lines.append(f'  <path class="teacher" d="M{place(teacher)},48 V{bottom}"/>')
    lines.append(f'  <text class="axis" x="{place(teacher)}" y="{bottom + 42}">teacher {teacher:.1f}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def list_outputs() -> dict[Path, str]:
    """Every page and figure by its path, as it should be."""
    pages = {page: make_page(page.read_text(encoding="utf-8")) for page in PAGES}
    return pages | {path: make_figure(read_report(name)) for name, path in FIGURES.items()}


def _describe(report: Report, run: str) -> str:
    descriptions = yaml.safe_load((REPORTS / "descriptions.yaml").read_text(encoding="utf-8"))
    return descriptions[report["name"]][run]


def _percent(value: Any) -> str:
    """A fraction, or {"mean", "sd"} of fractions, in percent without its sign; a dash where there is none."""
    if isinstance(value, dict):
        return format_number({name: None if part is None else 100 * part for name, part in value.items()}, ".1f")
    return "–" if value is None else f"{100 * value:.1f}"


def _format_nats(value: Any) -> str:
    return "–" if value is None else format_number(value, ".3f")


def _interval(each: Report | None, scale: float, digits: int) -> str:
    if each is None:
        return "–"
    mean, low, high = (each[name] for name in ("difference", "low", "high"))
    text = f"{scale * mean:+.{digits}f}"
    if low is not None:
        text += f" ({scale * low:+.{digits}f} to {scale * high:+.{digits}f})"
    return text.replace("-", "−")


def _format_p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< .0001" if value < 1e-4 else f"{value:.2g}".removeprefix("0")


def main(arguments: list[str]) -> int:
    """Returns the exit code: 1 for an outdated page with --check, 2 for wrong arguments."""
    match arguments:
        case []:
            pass
        case ["--add", path]:
            root = Path(path).resolve().parents[2]  # of <root>/runs/<name>/report.json
            report = json.loads(Path(path).read_text(encoding="utf-8").replace(f'"{root}/', '"'))
            (REPORTS / f"{report['name']}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        case ["--check"]:
            old = [path for path, text in list_outputs().items() if path.read_text(encoding="utf-8") != text]
            for path in old:
                sys.stderr.write(f"{path} is not what docs/results/ says; run `python -m docs.make_tables`\n")
            return int(bool(old))
        case _:
            sys.stderr.write(f"{__doc__}\n")
            return 2
    for path, text in list_outputs().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
