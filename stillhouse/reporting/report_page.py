"""report.html: one self-contained page, no script, nothing fetched; every text from data is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from stillhouse.reporting.plots import NO_CATEGORY, accuracy_plot, category_plot, colour_of, loss_plots
from storage.backends.disk import format_bytes

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fbfaf7; margin: 0 auto; max-width: 900px;
  padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.2rem 0 .3rem; }
p.lead { font-size: 1.1rem; border-left: 4px solid #c8553d; padding-left: .8rem; margin: 1.2rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .55rem; border-bottom: 1px solid #e3dfd5; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: #555; }
.wide { overflow-x: auto; } .dim { color: #777; } svg { width: 100%; height: auto; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: #555; } dd { margin: 0; }
"""


def render_page(report: dict[str, Any], metrics: dict[str, list[dict[str, float]]]) -> str:
    """The page as text. `metrics` holds the logged steps of every run, by "<run>/seed<k>"."""
    runs = report["runs"]
    pictures = loss_plots(runs, metrics)
    sections = [
        ("Result", _results(report)),
        ("Exact match by run", accuracy_plot(runs, report["teacher"].get("exact_match"))),
        ("Paired differences to the controls, points of exact match", _paired(report, "paired")),
        ("Exact match by question type", category_plot(runs) + _categories(runs)),
        *((("Yes/no questions", _yes_no(report)),) if any(run.get("yes_no") for run in runs) else ()),
        *(
            (("Words without support", _unsupported(report)),)
            if any(run.get("unsupported_rate") for run in runs)
            else ()
        ),
        *((("Routers of the sparse students", _routers(runs)),) if any(run.get("routers") for run in runs) else ()),
        ("The teacher and its cache", _cache(report)),
        *((f"While training: {name.replace('_', ' ')}", picture) for name, picture in pictures.items()),
    ]
    body = "\n".join(f"<h2>{escape(title)}</h2>\n{content}" for title, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report['name'])} · Stillhouse</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(report["name"])}</h1><p class="dim">{escape(report["machine"])}</p>'
        f'<p class="lead">{escape(report["verdict"])}</p>{body}</body></html>\n'
    )


def percent(value: dict[str, float] | None) -> str:
    """A share with its spread: "68.8 ± 0.7 %"; a dash when it was not measured."""
    return "–" if value is None else f"{100 * value['mean']:.1f} ± {100 * value['sd']:.1f} %"


def _nats(value: dict[str, float] | None) -> str:
    return "–" if value is None else f"{value['mean']:.3f} ± {value['sd']:.3f}"


def judged_turns(runs: Sequence[dict[str, Any]]) -> str:
    """Which of a conversation's answers the runs were judged by; evaluations of before judged first answers."""
    return " and ".join(sorted({f"{run.get('turns') or 'first'} answers" for run in runs}))


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


def _names(runs: list[dict[str, Any]]) -> dict[str, str]:
    return {
        name: f'<span class="swatch" style="background:{colour}"></span>{escape(name)}'
        for name, colour in colour_of(runs).items()
    }


def _results(report: dict[str, Any]) -> str:
    runs, teacher = report["runs"], report["teacher"]
    header = [
        "run", "exact match", "cross-entropy", "KL to the teacher", "agreement", "steps", "seconds", "peak memory",
        "parameters, M",
    ]  # fmt: skip
    rows = [
        [
            _names(runs)[run["name"]],
            percent(run["exact_match"]),
            _nats(run.get("cross_entropy")),
            _nats(run["kl_to_teacher"]),
            percent(run["top1_agreement"]),
            str(run["steps"]),
            f"{run['seconds']:.0f}",
            format_bytes(run["peak_memory_bytes"]),
            _parameters(run),
        ]
        for run in runs
    ]
    if teacher:
        kl = teacher.get("kl_to_teacher")
        rows.append(
            [
                "teacher",
                f"{100 * teacher['exact_match']:.1f} %",
                "–" if teacher.get("cross_entropy") is None else f"{teacher['cross_entropy']:.3f}",
                "–" if kl is None else f"{kl:.3f}",
                "–" if teacher.get("top1_agreement") is None else f"{100 * teacher['top1_agreement']:.1f} %",
                "–",
                "–" if teacher.get("training_seconds") is None else f"{teacher['training_seconds']:.0f}",
                "–",
                "–" if teacher.get("num_parameters") is None else f"{teacher['num_parameters'] / 1e6:.2f}",
            ]
        )
    num_seeds = max((run["num_seeds"] for run in runs), default=0)
    note = (
        f'<p class="dim">Mean ± standard deviation over {num_seeds} seeds, of held-out samples. Exact match: of '
        f"{judged_turns(runs)}. Cross-entropy: nats a token of the references. Agreement: the most probable token is "
        "the teacher's.</p>"
    )
    return _table(header, rows) + note


def _paired(report: dict[str, Any], key: str) -> str:
    """Differences in points of what `key` compares, run by run and control by control."""
    rows = []
    for run in report["runs"]:
        for control, found in run.get(key, {}).items():
            interval = "–" if found["low"] is None else f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"
            rows.append([_names(report["runs"])[run["name"]], escape(control), f"{100 * found['mean']:+.1f}", interval])
    return _table(["run", "less", "difference", "95 % interval"], rows)


def _paired_below(report: dict[str, Any], key: str) -> str:
    """The same below a table of the shares that are compared; nothing without a control."""
    if not any(run.get(key) for run in report["runs"]):
        return ""
    return f"<h3>Paired differences to the controls, points of the first column</h3>{_paired(report, key)}"


def _parameters(run: dict[str, Any]) -> str:
    total, activated = run["num_parameters"], run["num_activated_parameters"]
    return f"{total / 1e6:.2f}" + (f" ({activated / 1e6:.2f} active)" if activated < total else "")


def _yes_no(report: dict[str, Any]) -> str:
    """How often a run claims what is not there, and by how much less than its controls."""
    header = ["run", "yes where the answer is no", "yes where it is yes", "accuracy", "yes in all"]
    names = ("hallucination_rate", "recall", "accuracy", "yes_ratio")
    runs = [run for run in report["runs"] if run.get("yes_no")]
    rows = [
        [_names(report["runs"])[run["name"]], *(percent(run["yes_no"].get(name)) for name in names)] for run in runs
    ]
    teacher = report["teacher"].get("yes_no")
    if teacher:
        shares = (teacher[name] for name in names)
        rows.append(["teacher", *("–" if share is None else f"{100 * share:.1f} %" for share in shares)])
    note = '<p class="dim">The first column is POPE\'s false-positive rate: claims of what is not there.</p>'
    return _table(header, rows) + note + _paired_below(report, "paired_hallucination_rate")


def _unsupported(report: dict[str, Any]) -> str:
    """How often a run's answers name what the reference does not, and by how much less than its controls'."""
    runs = report["runs"]
    rows = [
        [_names(runs)[run["name"]], percent(run["unsupported_rate"])] for run in runs if run.get("unsupported_rate")
    ]
    teacher = report["teacher"].get("unsupported_rate")
    if teacher is not None:
        rows.append(["teacher", f"{100 * teacher:.1f} %"])
    note = (
        '<p class="dim">Of all held-out samples. A right word in the wrong place counts as supported; case and '
        "punctuation at a word's ends do not count.</p>"
    )
    table = _table(["run", "answers with a word that the reference lacks"], rows)
    return table + note + _paired_below(report, "paired_unsupported_rate")


def _routers(runs: list[dict[str, Any]]) -> str:
    """A row for each sparse layer: what its experts get of the tokens of the held-out samples."""
    rows = []
    for name, routers in ((run["name"], run["routers"]) for run in runs if run.get("routers")):
        of_run = [_nats(routers["entropy"]), _nats(routers["balance"]), _nats(routers["z"]), str(routers["dropped"])]
        for layer, shares in enumerate(routers["load"]):
            load = " · ".join(f"{100 * share:.1f}" for share in shares)
            first = layer == 0
            rows.append([_names(runs)[name] if first else "", str(layer + 1), load, *(of_run if first else [""] * 4)])
    header = ["run", "sparse layer", "load of its experts, %", "entropy, nats", "balance", "z", "dropped"]
    note = (
        '<p class="dim">On held-out samples. Experts of a layer from the busiest to the idlest, then the mean over '
        "seeds; balance is 1 a layer where the load is even. Experts have no capacity, so no token is dropped.</p>"
    )
    return _table(header, rows) + note


def _categories(runs: list[dict[str, Any]]) -> str:
    categories = sorted({category for run in runs for category in run["by_category"]})
    missing: dict[str, float] | None = None
    rows = [
        [_names(runs)[run["name"]], *(percent(run["by_category"].get(category, missing)) for category in categories)]
        for run in runs
    ]
    return _table(["run", *(category or NO_CATEGORY for category in categories)], rows)


def _cache(report: dict[str, Any]) -> str:
    cache, dump = report["cache"], report["dump"]
    facts: list[tuple[str, str]] = []
    if cache:
        per_row = cache["bytes_per_row_by_family"]
        facts += [
            ("samples", f"{cache['num_samples']:,} ({cache['num_errors']} refused)"),
            ("size", f"{format_bytes(cache['bytes'])} for {cache['num_rows']:,} cached rows"),
            ("bytes a row", ", ".join(f"{name} {size:.1f}" for name, size in per_row.items())),
            ("by family", ", ".join(f"{name} {format_bytes(size)}" for name, size in cache["bytes_by_family"].items())),
            ("teacher", f"{cache['teacher']}, {cache['engine']}"),
        ]
    if dump:
        facts += [("dump", f"{dump['num_tokens']:,} tokens at {dump['tokens_per_s']:,.0f} tokens/s")]
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return f"<dl>{items}</dl>"
