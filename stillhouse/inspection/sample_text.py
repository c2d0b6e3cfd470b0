"""Cache facts and samples as text for a terminal. Nothing from the data set can steer it (token_texts.printable)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from stillhouse.inspection.cache_facts import CacheFacts
from stillhouse.inspection.sample_view import AnswerToken, ImageView, SampleView, Segment, Signal, relation_summary
from stillhouse.inspection.token_texts import printable
from stillhouse.reporting.report_page import format_bytes
from stillhouse.reporting.summary import columns
from storage.records.records import SampleError

WIDTH = 100
BAR_WIDTH = 30
NUM_ERRORS_SHOWN = 10


def facts_text(facts: CacheFacts) -> str:
    """Identity, counts, sizes, sharing and errors."""
    state = "sealed" if facts.sealed else "not sealed: its dump has not finished"
    splits = ", ".join(f"{printable(name)} {number:,}" for name, number in facts.num_samples_by_split.items())
    head = [
        ("cache", f"{facts.path}, {state}"),
        ("parts", f"{facts.num_parts:,} of {facts.num_planned_parts:,}"),
        *facts.segments.items(),
        ("samples", f"{facts.num_samples:,}" + (f" ({splits})" if splits else "")),
        ("errors", f"{len(facts.errors):,}"),
    ]
    sizes = [("family", "rows", "bytes", "bytes a row")]
    for name, family in facts.families.items():
        each = "–" if family.bytes_per_row is None else f"{family.bytes_per_row:,.1f}"
        number = "–" if family.num_rows is None else f"{family.num_rows:,}"
        sizes.append((name, number, format_bytes(family.num_bytes), each))
    sizes.append(("total", "", format_bytes(facts.num_bytes), ""))
    identity = [(name, printable(str(value))) for name, value in facts.identity.items()]
    blocks = [columns(head), columns(sizes), sharing_sentence(facts)]
    blocks += [columns(table) if len(table) > 1 else "" for table in (losses_table(facts), budgets_table(facts))]
    blocks += [_errors(facts), "identity", columns(identity)]
    return "\n\n".join(block for block in blocks if block)


def losses_table(facts: CacheFacts) -> list[tuple[str, ...]]:
    """What was lost, a row for each family and step, below a head; the head alone where nothing is stated."""
    head = ("lost", "by", "measure", "mean", "p99", "max")
    return [
        head,
        *(
            (one.family, _STEPS[one.kind], one.measure, f"{one.mean:.2g}", f"{one.p99:.2g}", f"{one.max:.2g}")
            for one in facts.losses
        ),
    ]


def budgets_table(facts: CacheFacts) -> list[tuple[str, ...]]:
    """What fidelity budgets chose, predicted and turned out to be, below a head; the head alone without a budget."""
    head = ("budget", "asked", "τ", "error predicted", "bytes a row predicted", "real")
    return [
        head,
        *(
            (
                one.family, one.asked, f"{one.tau:g}", f"{one.predicted_gradient_error:.3g}",
                f"{one.predicted_bytes_per_row:.1f}", "–" if one.bytes_per_row is None else f"{one.bytes_per_row:.1f}",
            )
            for one in facts.budgets
        ),
    ]  # fmt: skip


_STEPS = {
    "teacher_noise": "teacher noise",
    "selection_errors": "selection",
    "dropped_mass": "mass dropped",
    "errors_by_family": "encoding",
}


def sharing_sentence(facts: CacheFacts) -> str:
    """What storing signals once an image key saved; empty without images."""
    sharing = facts.image_sharing
    if not sharing.num_named:
        return ""
    text = f"{counted(sharing.num_named, 'image')} named by samples, {counted(sharing.num_stored, 'image key')} stored"
    if not sharing.saved_bytes:
        return text
    parts = " and ".join(f"{format_bytes(size)} of {name}" for name, size in sharing.saved_bytes_by_family.items())
    return f"{text}: saved about {parts} signals"


def sample_text(view: SampleView) -> str:
    """One sample: images, conversation, every answer token with its alternatives as bars."""
    mean = "" if view.mean_entropy is None else f", mean entropy {view.mean_entropy:.3f} nats"
    title = printable(f"sample {view.sample_id}: split {view.split or '–'}, category {view.category or '–'}{mean}")
    lines = [title, "─" * min(WIDTH, len(title))]
    for number, image in enumerate(view.images, 1):
        lines += _image(number, image)
    lines += ["", *(_segment(segment) for segment in view.segments)]
    for token in view.tokens:
        lines += ["", *_token(token)]
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def bar(fraction: float, *, mark: str = "█") -> str:
    """A bar of BAR_WIDTH characters, eighths of a character where it is solid."""
    eighths = round(max(0.0, min(1.0, fraction)) * BAR_WIDTH * 8)
    if mark != "█":
        return (mark * max(1 if fraction > 0 else 0, eighths // 8)).ljust(BAR_WIDTH)
    partial = " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return (mark * (eighths // 8) + (partial or ("▏" if fraction > 0 and eighths == 0 else ""))).ljust(BAR_WIDTH)


def _errors(facts: CacheFacts) -> str:
    if not facts.errors:
        return ""
    shown = list(facts.errors.items())[:NUM_ERRORS_SHOWN]
    lines = [printable(f"  {SampleError(sample_id, reason)}") for sample_id, reason in shown]
    more = len(facts.errors) - len(shown)
    return "\n".join(["samples without a record", *lines, *([f"  and {more:,} more (--json has all)"] if more else [])])


def _image(number: int, view: ImageView) -> list[str]:
    image = view.image
    shared = counted(view.num_sharing, "sample")
    lines = [f"image {number}: {printable(image.path)}, {image.num_visual_tokens} visual tokens, key of {shared}"]
    if view.relation is not None:
        found = relation_summary(view.relation)
        lines.append(
            f"  relation {found.num_rows} × {found.num_rows}: norm {found.norm:.4g}; of norm 1, values "
            f"{found.smallest:.3f} to {found.largest:.3f}, mean {found.mean:.3f}; "
            f"effective rank {found.effective_rank:.2f}"
        )
    if view.visual:
        entropies = [signal.entropy for signal in view.visual]
        mean = sum(entropies) / len(entropies)
        lines.append(f"  visual: entropy {min(entropies):.3f} to {max(entropies):.3f} nats, mean {mean:.3f}")
    return lines


def _segment(segment: Segment) -> str:
    if segment.kind == "image":
        return f"   [image {segment.text}]"
    lead = " » " if segment.kind == "answer" else "   "
    lines = []
    for line in printable(segment.text).strip("\n").split("\n"):
        lines += textwrap.wrap(line, WIDTH - 3, replace_whitespace=False) or [""]
    return "\n".join(lead + line for line in lines)


def _token(token: AnswerToken) -> list[str]:
    signal = token.signal
    if signal is None:
        return [f"“{token.text}”  (the cache holds no response rows)"]
    return [
        f"“{token.text}”  {label_words(signal)} · entropy {signal.entropy:.3f} nats · "
        f"{signal.num_exact} exact entries, {signal.num_sampled} sampled",
        *_aligned(_bars(token, signal)),
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def label_words(signal: Signal) -> str:
    """What the teacher gave to the label token itself."""
    if signal.label_logprob is None:
        return "no label"
    return f"{100 * math.exp(min(0.0, signal.label_logprob)):.1f} % (logprob {signal.label_logprob:.3g})"


def _bars(token: AnswerToken, signal: Signal) -> Sequence[Sequence[str]]:
    rows = []
    shown = signal.shown(token.token_id)
    for entry, probability in shown:
        if not entry.sampled:
            mark = "◀ label" if entry.token_id == token.token_id else ""
            rows.append((f"  {entry.text}", _percent(probability), bar(probability), mark))
    hidden = signal.num_exact - len(rows)
    if hidden:
        rows.append((f"  {hidden} more", _percent(signal.hidden_mass), bar(signal.hidden_mass), "exact, not shown"))
    rows.append(("  tail", _percent(signal.tail_mass), bar(signal.tail_mass, mark="░"), "all that is not exact"))
    for entry, weight in shown:
        if entry.sampled:
            mark = "sampled from the tail" + (" ◀ label" if entry.token_id == token.token_id else "")
            rows.append((f"    ~ {entry.text}", _percent(weight), bar(weight, mark="░"), mark))
    return rows


def _percent(fraction: float) -> str:
    return f"{100 * fraction:6.2f} %"
