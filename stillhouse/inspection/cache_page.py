"""The page of `stillhouse inspect --html`: a cache's facts and some of its samples, in one self-contained file.

No script, nothing fetched; every text from the data set is escaped, and the page's own policy
forbids scripts and the network besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from stillhouse.inspection.cache_facts import CacheFacts
from stillhouse.inspection.cache_style import STYLE
from stillhouse.inspection.image_previews import HeatMap, Picture, embedded_image, heat_map
from stillhouse.inspection.sample_text import budgets_table, counted, label_words, losses_table, sharing_sentence
from stillhouse.inspection.sample_view import AnswerToken, ImageView, SampleView, Segment, Signal, relation_summary
from stillhouse.inspection.token_texts import printable
from stillhouse.reporting.report_page import format_bytes
from storage.images.settings import PixelSettings
from storage.records.records import ImageRef

KEY = (
    '<p class="key dim"><span class="fill exact"></span>exact <span class="fill sampled"></span>sampled '
    '<span class="fill hidden"></span>exact, not listed <span class="fill tail"></span>tail: all that is not exact '
    '<span class="fill mark"></span>the label; in the conversation, the redder an answer token, '
    "the less the teacher believes it</p>"
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MAX_CARDS = 48  # of a sample; of a longer answer the most interesting tokens
MAX_CARDS_BESIDE = 6  # of a sample; more go below its image
MAX_GRID_TEXTS = 64  # visual tokens whose text is shown in the grid
NUM_ERRORS_SHOWN = 50


@dataclass(frozen=True)
class Group:
    """Samples under one heading."""

    title: str
    note: str
    views: Sequence[SampleView]


def render_cache_page(
    facts: CacheFacts,
    groups: Sequence[Group],
    *,
    image_root: Path,
    follows_links: bool,
    pixels: PixelSettings,
    note: str,
) -> str:
    """The page as text. `note` says where the texts of tokens come from, `pixels` how the teacher saw the images.

    `follows_links`: whether links below `image_root` may lead out of it.
    """
    embed = partial(embedded_image, image_root, pixels=pixels, follows_links=follows_links)
    title = "/".join(facts.path.rstrip("/").split("/")[-2:])
    state = "sealed" if facts.sealed else f"not sealed: {facts.num_parts:,} of {facts.num_planned_parts:,} parts"
    lead = f"{state} · teacher {facts.identity['teacher']} · {note}"
    body = [f'<header><h1>{escape(title)}</h1><p class="dim">{escape(lead)}</p></header>', _tiles(facts)]
    body += [_families(facts), _plain_table(losses_table(facts)), _plain_table(budgets_table(facts))]
    body += [_errors(facts), _identity(facts)]
    number = 0
    body.append(KEY if groups else "")
    for group in groups:
        body.append(f'<h2>{escape(group.title)}</h2><p class="dim">{escape(group.note)}</p>')
        first = number + 1
        number += len(group.views)
        if len(group.views) > 1:
            body.append(_contents(group.views, first))
        body += [_sample(view, first + place, embed) for place, view in enumerate(group.views)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · Stillhouse</title><style>{STYLE}</style></head><body>"
        + "\n".join(part for part in body if part)
        + "</body></html>\n"
    )


def _tiles(facts: CacheFacts) -> str:
    sharing = facts.image_sharing
    tiles = [(f"{facts.num_samples:,}", "samples"), (f"{sharing.num_stored:,}", "image keys")]
    for family in ("response", "visual"):
        if family in facts.families and facts.families[family].bytes_per_row is not None:
            tiles.append((f"{facts.families[family].bytes_per_row:.1f} B", f"a {family} row"))
    tiles.append((format_bytes(facts.num_bytes), "on disk"))
    if sharing.saved_bytes:
        tiles.append((format_bytes(sharing.saved_bytes), "saved by sharing images"))
    tiles.append((f"{len(facts.errors):,}", "errors"))
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    return f'<div class="tiles">{cells}</div>'


def _families(facts: CacheFacts) -> str:
    largest = max(1, *(family.num_bytes for family in facts.families.values()))
    rows = []
    for name, family in facts.families.items():
        each = "–" if family.bytes_per_row is None else f"{family.bytes_per_row:,.1f}"
        number = "–" if family.num_rows is None else f"{family.num_rows:,}"
        rows.append(
            f"<tr><td>{escape(name)}</td><td>{number}</td><td>{format_bytes(family.num_bytes)}</td>"
            f'<td>{each}</td><td class="track">{_fill(family.num_bytes / largest, "size")}</td></tr>'
        )
    head = "<tr><th>family</th><th>rows</th><th>bytes</th><th>bytes a row</th><th></th></tr>"
    sentence = sharing_sentence(facts)
    after = f'<p class="dim">{escape(sentence)}.</p>' if sentence else ""
    return f'<div class="wide"><table class="sizes">{head}{"".join(rows)}</table></div>{after}'


def _plain_table(table: Sequence[tuple[str, ...]]) -> str:
    """A head and rows; nothing where there are no rows."""
    if len(table) < 2:
        return ""
    tags = ["th", *["td"] * (len(table) - 1)]
    rows = "".join(
        f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>"
        for tag, row in zip(tags, table, strict=True)
    )
    return f'<div class="wide"><table class="sizes">{rows}</table></div>'


def _errors(facts: CacheFacts) -> str:
    if not facts.errors:
        return ""
    shown = list(facts.errors.items())[:NUM_ERRORS_SHOWN]
    rows = "".join(f"<dt>{escape(sample_id)}</dt><dd>{escape(reason)}</dd>" for sample_id, reason in shown)
    more = len(facts.errors) - len(shown)
    rest = f'<p class="dim">and {more:,} more</p>' if more else ""
    title = f"{counted(len(facts.errors), 'sample')} without a record"
    return f"<details><summary>{title}</summary><dl>{rows}</dl>{rest}</details>"


def _identity(facts: CacheFacts) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.identity.items())
    return f'<details><summary>identity</summary><dl class="code">{rows}</dl></details>'


def _contents(views: Sequence[SampleView], first: int) -> str:
    means = [view.mean_entropy for view in views]
    largest = max(1e-9, *(mean or 0.0 for mean in means))
    rows = []
    for number, (view, mean) in enumerate(zip(views, means, strict=True), first):
        answer = " … ".join(segment.text for segment in view.segments if segment.kind == "answer")
        rows.append(
            f'<tr><td><a href="#s{number}">{escape(view.sample_id)}</a></td>'
            f'<td class="text">{escape(_short(answer))}</td><td class="text">{_doubt(view)}</td>'
            f"<td>{'–' if mean is None else f'{mean:.2f}'}</td>"
            f'<td class="track">{_fill((mean or 0.0) / largest, "entropy")}</td></tr>'
        )
    head = "<tr><th>sample</th><th>answer</th><th>least sure at</th><th>nats</th><th>mean entropy</th></tr>"
    return f'<div class="wide"><table class="contents">{head}{"".join(rows)}</table></div>'


def _doubt(view: SampleView) -> str:
    """The token with the greatest entropy, and what the teacher would have said."""
    tokens = [token for token in view.tokens if token.signal and token.signal.alternatives]
    if not tokens:
        return "–"
    worst = max(tokens, key=lambda token: token.signal.entropy if token.signal else 0.0)
    assert worst.signal is not None
    top, probability = worst.signal.shown(worst.token_id)[0]
    said = f"<code>{escape(_short(top.text, 16))}</code> {_percent(probability)}"
    return f"<code>{escape(_short(worst.text, 16))}</code> – teacher: {said}"


def _sample(view: SampleView, number: int, embed: Callable[[ImageRef], Picture]) -> str:
    facts = [f"split {view.split}" if view.split else "", view.category, counted(len(view.tokens), "answer token")]
    if view.mean_entropy is not None:
        facts.append(f"mean entropy {view.mean_entropy:.3f} nats")
    meta = " · ".join(fact for fact in facts if fact)
    figures = "".join(_figure(image, place, embed) for place, image in enumerate(view.images, 1))
    talk = "".join(_segment(segment) for segment in view.segments)
    left = f'<div class="figures">{figures}</div>' if figures else ""
    signals = "".join(_image_signals(image, place) for place, image in enumerate(view.images, 1))
    beside, below = ("", _cards(view)) if len(view.tokens) > MAX_CARDS_BESIDE else (_cards(view), "")
    return (
        f'<section class="sample" id="s{number}"><h3>{escape(view.sample_id)}</h3><p class="dim">{escape(meta)}</p>'
        f'<div class="top">{left}<div class="right"><div class="talk">{talk}</div>{beside}</div></div>{below}'
        + (f'<div class="signals">{signals}</div>' if signals else "")
        + "</section>"
    )


def _figure(view: ImageView, number: int, embed: Callable[[ImageRef], Picture]) -> str:
    picture = embed(view.image)
    shared = "this sample alone" if view.num_sharing == 1 else counted(view.num_sharing, "sample")
    if picture.uri:
        small = ' class="pixels"' if max(picture.width, picture.height) <= 128 else ""
        shown = f'<img{small} src="{picture.uri}" alt="image {number}">'
        size = f"{picture.width} × {picture.height} pixels, "
    else:
        shown, size = f'<div class="missing">image not shown: {escape(picture.reason)}</div>', ""
    words = f"{size}{view.image.num_visual_tokens} visual tokens, signals kept for {shared}"
    return (
        f"<figure>{shown}<figcaption><b>image {number}</b> <code>{escape(view.image.path)}</code><br>"
        f"{escape(words)}</figcaption></figure>"
    )


def _segment(segment: Segment) -> str:
    if segment.kind == "image":
        return f'<span class="image">image {escape(segment.text)}</span>'
    if segment.kind == "prompt":
        return f'<span class="prompt">{escape(printable(segment.text))}</span>'
    tokens = "".join(
        f'<span class="token" style="background:{_heat(token.signal)}" title="{escape(_hover(token))}">'
        f"{escape(token.text)}</span>"
        for token in segment.tokens
    )
    return f'<span class="answer">{tokens}</span>'


def _hover(token: AnswerToken) -> str:
    if token.signal is None:
        return f"id {token.token_id}"
    return f"id {token.token_id}, {label_words(token.signal)}, entropy {token.signal.entropy:.3f} nats"


def _heat(signal: Signal | None) -> str:
    """White where the teacher gives the label all mass, orange where it gives none."""
    if signal is None or signal.label_logprob is None:
        return "#fff"
    return f"rgba(214, 92, 40, {0.06 + 0.64 * (1 - math.exp(min(0.0, signal.label_logprob))):.2f})"


def _cards(view: SampleView) -> str:
    tokens = view.tokens
    if not tokens:
        return '<p class="dim">No answer tokens.</p>'
    if all(token.signal is None for token in tokens):
        return '<p class="dim">The cache holds no response rows.</p>'
    chosen = sorted(range(len(tokens)), key=lambda place: -_interest(tokens[place]))[:MAX_CARDS]
    note = ""
    if len(tokens) > MAX_CARDS:
        note = (
            f'<p class="dim note">The {MAX_CARDS} of {len(tokens)} tokens with the most entropy and surprise at the '
            "label, in their order.</p>"
        )
    cards = "".join(_card(tokens[place], place + 1) for place in sorted(chosen))
    return f'{note}<div class="cards">{cards}</div>'


def _interest(token: AnswerToken) -> float:
    """Nats: the teacher's entropy, and its surprise at the label."""
    return token.signal.entropy - (token.signal.label_logprob or 0.0) if token.signal else 0.0


def _card(token: AnswerToken, number: int) -> str:
    signal = token.signal
    assert signal is not None
    bars = []
    shown = signal.shown(token.token_id)
    for entry, probability in shown:
        label = " label" if entry.token_id == token.token_id else ""
        if not entry.sampled:
            bars.append(_bar(entry.text, probability, f"exact{label}"))
    hidden = signal.num_exact - len(bars)
    if hidden:
        bars.append(_bar(f"{hidden} more", signal.hidden_mass, "hidden"))
    bars.append(_bar("tail", signal.tail_mass, "tail"))
    for entry, weight in shown:
        if entry.sampled:
            label = " label" if entry.token_id == token.token_id else ""
            bars.append(_bar(f"~ {entry.text}", weight, f"sampled{label}"))
    counts = f"{signal.num_exact} exact" + (f", {signal.num_sampled} sampled" if signal.num_sampled else "")
    return (
        f'<div class="card"><div class="head"><code>{escape(token.text)}</code><span>{number}</span></div>'
        f"<p>label {escape(label_words(signal))}<br>entropy {signal.entropy:.3f} nats · {counts}</p>"
        f"{''.join(bars)}</div>"
    )


def _bar(text: str, fraction: float, kind: str) -> str:
    name = f"<code>{escape(text)}</code>" if kind.split()[0] in ("exact", "sampled") else f"<i>{escape(text)}</i>"
    return (
        f'<div class="bar {kind}" title="{escape(text)}: {fraction:.6f}">{name}'
        f'<span class="track">{_fill(fraction, kind.split()[0])}</span><span>{_percent(fraction)}</span></div>'
    )


def _fill(fraction: float, kind: str) -> str:
    return f'<span class="fill {kind}" style="width:{100 * max(0.0, min(1.0, fraction)):.2f}%"></span>'


def _image_signals(view: ImageView, number: int) -> str:
    parts = [_relation(view), _visual_entropy(view)]
    if not any(parts):
        return ""
    return f'<div class="maps"><h4>image {number}</h4><div class="row">{"".join(parts)}</div></div>'


def _relation(view: ImageView) -> str:
    if view.relation is None:
        return ""
    found = relation_summary(view.relation)
    words = f"norm {found.norm:.4g}, effective rank {found.effective_rank:.2f}"
    return _map(heat_map(view.relation.values), f"relation matrix, {found.num_rows} × {found.num_rows}", words)


def _visual_entropy(view: ImageView) -> str:
    """How sure the teacher is at each visual token, laid out as the image where the grid is a square."""
    if not view.visual:
        return ""
    side = math.isqrt(len(view.visual))
    square = side * side == len(view.visual)
    entropies = np.array([signal.entropy for signal in view.visual], np.float32)
    values = entropies.reshape(side, side) if square else entropies[None]
    drawn = _map(heat_map(values), "entropy of each visual token, nats", f"mean {entropies.mean():.3f}")
    if not square or len(view.visual) > MAX_GRID_TEXTS:
        return drawn
    cells = "".join(
        f'<div title="entropy {signal.entropy:.3f} nats"><code>{escape(_short(top.text, 14))}</code>'
        f"<small>{_percent(top.probability)}</small></div>"
        for signal in view.visual
        for top in signal.alternatives[:1]
    )
    grid = f'<div class="grid" style="grid-template-columns:repeat({side}, 1fr)">{cells}</div>'
    return f"{drawn}<figure><figcaption>likeliest next token at each visual token</figcaption>{grid}</figure>"


def _map(drawn: HeatMap, title: str, words: str) -> str:
    thinned = f", one of {drawn.step} rows and columns shown" if drawn.step > 1 else ""
    clipped = ", some beyond the colours' ends" if drawn.clipped else ""
    size = "heat large" if drawn.is_large else "heat"
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><img class="{size}" src="{drawn.uri}" alt="{escape(title)}">'
        f'<div class="legend"><span>{drawn.low:.3g}</span>'
        f'<span class="ramp" style="background:{drawn.gradient}"></span><span>{drawn.high:.3g}</span></div>'
        f'<p class="dim">{escape(words + thinned + clipped)}</p></figure>'
    )


def _short(text: str, length: int = 60) -> str:
    flat = printable(" ".join(text.split()))
    return flat if len(flat) <= length else f"{flat[: length - 1]}…"


def _percent(fraction: float) -> str:
    shown = f"{100 * fraction:.1f}" if fraction >= 0.0005 or fraction == 0 else "<0.05"
    return f"{shown}\N{NO-BREAK SPACE}%"
