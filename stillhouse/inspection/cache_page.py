"""Renders the page of `stillhouse inspect --html`: the facts of a cache and some samples, in one self-contained file.

The page has no script and fetches nothing. Its template escapes every text from the data set, and its content
security policy forbids scripts and the network besides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillhouse.inspection.cache_facts import CacheFacts
from stillhouse.inspection.image_previews import draw_heat_map, embed_image
from stillhouse.inspection.sample_text import (
    count_noun,
    describe_label,
    describe_sharing,
    tabulate_budgets,
    tabulate_errors,
)
from stillhouse.inspection.sample_view import AnswerToken, SampleView, TokenSignal, chart_bars, summarise_relation
from stillhouse.inspection.token_texts import escape_unprintable
from stillhouse.reporting.templates import render_template
from storage.images.settings import PixelSettings


@dataclass(frozen=True)
class SampleGroup:
    """Samples under one heading."""

    title: str
    note: str
    views: Sequence[SampleView]


def render_cache_page(
    facts: CacheFacts,
    groups: Sequence[SampleGroup],
    *,
    image_root: Path,
    follows_links: bool,
    pixels: PixelSettings,
    note: str,
) -> str:
    """The page as text. `note` says where the texts of tokens come from, `pixels` how the teacher saw the images.

    `follows_links`: whether links below `image_root` may lead out of it.
    """
    numbers = itertools.count(1)
    functions = (
        chart_bars, count_noun, describe_label, draw_heat_map, escape_unprintable, summarise_relation, choose_cards,
        colour_label, describe_sample, describe_token, format_share, lay_out_entropies, shorten,
    )  # fmt: skip
    return render_template(
        "inspection/cache.html.jinja",
        title="/".join(facts.path.rstrip("/").split("/")[-2:]),
        facts=facts,
        largest_family=max(1, *(family.num_bytes for family in facts.families.values())),
        sharing_sentence=describe_sharing(facts),
        tables=(tabulate_errors(facts), tabulate_budgets(facts)),
        groups=[(group, [(next(numbers), view) for view in group.views]) for group in groups],
        note=note,
        embed_image=partial(embed_image, image_root, pixels=pixels, follows_links=follows_links),
        **{function.__name__: function for function in functions},
    )


def choose_cards(tokens: Sequence[AnswerToken], count: int) -> list[tuple[int, AnswerToken]]:
    """The `count` tokens of the most entropy and surprise at the label, in order, with their numbers from 1."""

    def interest(numbered: tuple[int, AnswerToken]) -> float:  # nats
        signal = numbered[1].signal
        return signal.entropy - (signal.label_logprob or 0.0) if signal else 0.0

    return sorted(sorted(enumerate(tokens, 1), key=interest, reverse=True)[:count], key=lambda pair: pair[0])


def lay_out_entropies(signals: Sequence[TokenSignal]) -> NDArray[np.float32]:
    """The entropy of each visual token, in nats: (side, side) where their number is a square, else (1, n)."""
    side = math.isqrt(len(signals))
    entropies = np.array([signal.entropy for signal in signals], np.float32)
    return entropies.reshape(side, side) if side * side == len(signals) else entropies[None]


def describe_sample(view: SampleView) -> str:
    """Split, category, number of answer tokens and mean entropy, as far as the sample has them."""
    split = f"split {view.split}" if view.split else ""
    mean = "" if view.mean_entropy is None else f"mean entropy {view.mean_entropy:.3f} nats"
    return " · ".join(filter(None, (split, view.category, count_noun(len(view.tokens), "answer token"), mean)))


def describe_token(token: AnswerToken) -> str:
    """Id, label probability and entropy of an answer token."""
    if token.signal is None:
        return f"id {token.token_id}"
    return f"id {token.token_id}, {describe_label(token.signal)}, entropy {token.signal.entropy:.3f} nats"


def colour_label(signal: TokenSignal | None) -> str:
    """A CSS colour: white where the teacher gives the label all mass, orange where it gives none."""
    if signal is None or signal.label_logprob is None:
        return "#fff"
    return f"rgba(214, 92, 40, {0.06 + 0.64 * (1 - math.exp(min(0.0, signal.label_logprob))):.2f})"


def shorten(text: str, length: int = 60) -> str:
    """The text in one line of at most `length` printable characters, with … where it was cut."""
    flat = escape_unprintable(" ".join(text.split()))
    return flat if len(flat) <= length else f"{flat[: length - 1]}…"


def format_share(fraction: float) -> str:
    """A percentage that never rounds a positive share to zero."""
    text = f"{100 * fraction:.1f}" if fraction >= 0.0005 or fraction == 0 else "<0.05"
    return f"{text}\N{NO-BREAK SPACE}%"
