"""Formats cache facts and samples as text for a terminal, with control characters of the data set escaped."""

from __future__ import annotations

import math
import textwrap

from stillhouse.inspection.cache_facts import CacheFacts
from stillhouse.inspection.sample_view import (
    AnswerToken,
    ChartBar,
    ImageView,
    SampleView,
    Segment,
    TokenSignal,
    chart_bars,
    summarise_relation,
)
from stillhouse.inspection.token_texts import escape_unprintable
from stillhouse.reporting.text_formats import format_columns, format_number
from storage.backends.disk import format_bytes
from storage.records.records import SampleError

WIDTH = 100
BAR_WIDTH = 30
MAX_ERRORS = 10
_ERROR_SOURCES = {
    "teacher_noise": "teacher noise", "selection_errors": "selection", "dropped_mass": "mass dropped",
    "errors_by_family": "encoding",
}  # fmt: skip
_REMARKS = {
    "exact": "", "hidden": "exact, not shown", "tail": "all that is not exact", "sampled": "sampled from the tail",
}  # fmt: skip


def format_facts(facts: CacheFacts) -> str:
    """Identity, counts, sizes, sharing and errors."""
    state = "sealed" if facts.sealed else "not sealed: its dump has not finished"
    splits = ", ".join(f"{escape_unprintable(name)} {number:,}" for name, number in facts.num_samples_by_split.items())
    head = [
        ("cache", f"{facts.path}, {state}"),
        ("parts", f"{facts.num_parts:,} of {facts.num_planned_parts:,}"),
        *facts.segments.items(),
        *facts.engine_checks.items(),
        ("samples", f"{facts.num_samples:,}" + (f" ({splits})" if splits else "")),
        ("errors", f"{len(facts.errors):,}"),
    ]
    sizes = [("family", "rows", "bytes", "bytes a row")]
    for name, family in facts.families.items():
        bytes_per_row = format_number(family.bytes_per_row, ",.1f")
        sizes.append((name, format_number(family.num_rows), format_bytes(family.num_bytes), bytes_per_row))
    sizes.append(("total", "", format_bytes(facts.num_bytes), ""))
    identity = [(name, escape_unprintable(str(value))) for name, value in facts.identity.items()]
    tables = [table for table in (tabulate_errors(facts), tabulate_budgets(facts)) if len(table) > 1]
    blocks = [format_columns(head), format_columns(sizes), describe_sharing(facts), *map(format_columns, tables)]
    blocks += [_format_sample_errors(facts), "identity", format_columns(identity)]
    return "\n\n".join(block for block in blocks if block)


def tabulate_errors(facts: CacheFacts) -> list[tuple[str, ...]]:
    """Error summaries, a row for each family and source, below a row of headings; the headings alone without any."""
    rows = [
        (
            summary.family, _ERROR_SOURCES[summary.kind], summary.measure,
            f"{summary.mean:.2g}", f"{summary.p99:.2g}", f"{summary.max:.2g}",
        )
        for summary in facts.error_summaries
    ]  # fmt: skip
    return [("lost", "by", "measure", "mean", "p99", "max"), *rows]


def tabulate_budgets(facts: CacheFacts) -> list[tuple[str, ...]]:
    """Fidelity budgets with prediction and result, below a row of headings; the headings alone without any."""
    rows = [
        (
            budget.family, budget.target, f"{budget.tau:g}", f"{budget.predicted_gradient_error:.3g}",
            f"{budget.predicted_bytes_per_row:.1f}", format_number(budget.bytes_per_row, ".1f"),
        )
        for budget in facts.budgets
    ]  # fmt: skip
    return [("budget", "asked", "τ", "error predicted", "bytes a row predicted", "real"), *rows]


def describe_sharing(facts: CacheFacts) -> str:
    """How many bytes it saves to store signals once for each image key; empty without images."""
    sharing = facts.image_sharing
    if not sharing.num_named:
        return ""
    named, stored = count_noun(sharing.num_named, "image"), count_noun(sharing.num_stored, "image key")
    text = f"{named} named by samples, {stored} stored"
    if not sharing.saved_bytes:
        return text
    parts = " and ".join(f"{format_bytes(size)} of {name}" for name, size in sharing.saved_bytes_by_family.items())
    return f"{text}: saved about {parts} signals"


def format_sample(view: SampleView) -> str:
    """One sample: images, conversation, every answer token with its alternatives as bars."""
    mean = "" if view.mean_entropy is None else f", mean entropy {view.mean_entropy:.3f} nats"
    title = f"sample {view.sample_id}: split {view.split or '–'}, category {view.category or '–'}{mean}"
    title = escape_unprintable(title)
    lines = [title, "─" * min(WIDTH, len(title))]
    for number, image in enumerate(view.images, 1):
        lines += _format_image(number, image)
    lines += ["", *map(_format_segment, view.segments)]
    for token in view.tokens:
        lines += ["", _format_token(token)]
    return "\n".join(lines)


def count_noun(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def draw_bar(fraction: float, *, mark: str = "█") -> str:
    """A bar of BAR_WIDTH characters, drawn in eighths of a character where it is solid."""
    eighths = round(max(0.0, min(1.0, fraction)) * BAR_WIDTH * 8)
    if mark != "█":
        return (mark * max(1 if fraction > 0 else 0, eighths // 8)).ljust(BAR_WIDTH)
    partial = " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    smallest = "▏" if fraction > 0 and eighths == 0 else ""
    return (mark * (eighths // 8) + (partial or smallest)).ljust(BAR_WIDTH)


def describe_label(signal: TokenSignal) -> str:
    """The probability and logprob that the teacher gives the label token."""
    if signal.label_logprob is None:
        return "no label"
    return f"{100 * math.exp(min(0.0, signal.label_logprob)):.1f} % (logprob {signal.label_logprob:.3g})"


def _format_sample_errors(facts: CacheFacts) -> str:
    if not facts.errors:
        return ""
    errors = [SampleError(sample_id, reason) for sample_id, reason in list(facts.errors.items())[:MAX_ERRORS]]
    lines = [escape_unprintable(f"  {error}") for error in errors]
    num_others = len(facts.errors) - len(errors)
    if num_others:
        lines.append(f"  and {num_others:,} more (--json has all)")
    return "\n".join(["samples without a record", *lines])


def _format_image(number: int, view: ImageView) -> list[str]:
    path, num_tokens = escape_unprintable(view.image.path), view.image.num_visual_tokens
    lines = [f"image {number}: {path}, {num_tokens} visual tokens, key of {count_noun(view.num_sharing, 'sample')}"]
    if view.relation is not None:
        summary = summarise_relation(view.relation)
        lines.append(
            f"  relation {summary.num_rows} × {summary.num_rows}: norm {summary.norm:.4g}; of norm 1, values "
            f"{summary.smallest:.3f} to {summary.largest:.3f}, mean {summary.mean:.3f}; "
            f"effective rank {summary.effective_rank:.2f}"
        )
    if view.visual:
        entropies = [signal.entropy for signal in view.visual]
        mean = sum(entropies) / len(entropies)
        lines.append(f"  visual: entropy {min(entropies):.3f} to {max(entropies):.3f} nats, mean {mean:.3f}")
    return lines


def _format_segment(segment: Segment) -> str:
    if segment.kind == "image":
        return f"   [image {segment.text}]"
    lead = " » " if segment.kind == "answer" else "   "
    lines = []
    for line in escape_unprintable(segment.text).strip("\n").split("\n"):
        lines += textwrap.wrap(line, WIDTH - 3, replace_whitespace=False) or [""]
    return "\n".join(lead + line for line in lines)


def _format_token(token: AnswerToken) -> str:
    signal = token.signal
    if signal is None:
        return f"“{token.text}”  (the cache holds no response rows)"
    return (
        f"“{token.text}”  {describe_label(signal)} · entropy {signal.entropy:.3f} nats · "
        f"{signal.num_exact} exact entries, {signal.num_sampled} sampled\n"
        + format_columns([_format_bar(bar) for bar in chart_bars(token)], align_right=False)
    )


def _format_bar(bar: ChartBar) -> tuple[str, str, str, str]:
    indent = "    " if bar.kind == "sampled" else "  "
    remark = _REMARKS[bar.kind] + " ◀ label" * bar.is_label
    drawing = draw_bar(bar.fraction, mark="░" if bar.kind in ("tail", "sampled") else "█")
    return f"{indent}{bar.text}", f"{100 * bar.fraction:6.2f} %", drawing, remark.lstrip()
