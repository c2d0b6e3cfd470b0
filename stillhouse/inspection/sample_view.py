"""Collects what a cache holds of one sample for display: conversation, answer tokens, images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from heapq import nlargest
from typing import Any, Literal

import numpy as np

from stillhouse.inspection.token_texts import TokenTexts
from storage.errors import ConfigError
from storage.reader.cache import Cache
from storage.records.records import ImageRef, Relation, SampleRecord, TokensRecord
from storage.records.sparse_rows import SparseRows

MAX_EXACT_SHOWN = 6  # exact alternatives of a token
NUM_EXACT_ALWAYS = 2  # that are shown however improbable; others need MIN_SHOWN
MIN_SHOWN = 0.001  # probability
MAX_SAMPLED_SHOWN = 3
NUM_NEAREST_IDS = 3
MAX_COMPARED_IDS = 500  # that difflib compares in full


@dataclass(frozen=True)
class Alternative:
    """A stored entry of the teacher's distribution."""

    token_id: int
    text: str
    probability: float  # of a sampled entry its weight: draws times tau
    sampled: bool


@dataclass(frozen=True)
class TokenSignal:
    """The teacher's distribution at one token. Exact entries and `tail_mass` sum to 1."""

    alternatives: tuple[Alternative, ...]  # exact ones by falling probability, then sampled ones by falling weight
    num_exact: int  # stored exact entries; the first few are alternatives
    num_sampled: int
    hidden_mass: float  # of stored exact entries that are no alternatives
    tail_mass: float
    entropy: float  # nats
    label_logprob: float | None  # nats; None for a visual token, which has no label

    def list_probabilities(self, label_id: int) -> list[tuple[Alternative, float]]:
        """The alternatives with the probabilities to show: exact ones by falling probability, then sampled ones.

        The label's is exp(label_logprob), which is exact, since its stored probability is rounded and the two
        would contradict each other on one page. A sampled entry keeps its weight.
        """

        def probability(entry: Alternative) -> float:
            if entry.token_id != label_id or entry.sampled or self.label_logprob is None:
                return entry.probability
            return math.exp(min(0.0, self.label_logprob))

        pairs = [(entry, probability(entry)) for entry in self.alternatives]
        return sorted(pairs, key=lambda pair: (pair[0].sampled, 0.0 if pair[0].sampled else -pair[1]))


@dataclass(frozen=True)
class AnswerToken:
    """One token under the response mask; its signal is None in a cache without the family response."""

    token_id: int
    text: str
    signal: TokenSignal | None


@dataclass(frozen=True)
class ChartBar:
    """One bar of the chart of a token's distribution."""

    text: str
    fraction: float  # probability, or the weight of a sampled entry
    kind: Literal["exact", "hidden", "tail", "sampled"]
    is_label: bool = False


@dataclass(frozen=True)
class Segment:
    """A stretch of the conversation. An image's text is its number from 1; an answer has tokens."""

    kind: Literal["prompt", "answer", "image"]
    text: str
    tokens: tuple[AnswerToken, ...] = ()


@dataclass(frozen=True)
class RelationSummary:
    """A relation matrix in numbers."""

    num_rows: int
    norm: float
    smallest: float
    mean: float
    largest: float
    effective_rank: float  # (sum of eigenvalues)² / sum of their squares; the squared trace at norm 1


@dataclass(frozen=True, eq=False)
class ImageView:
    """One image with the signals under its key, which all samples that name the key share."""

    image: ImageRef
    num_sharing: int  # samples of the cache that name its key
    relation: Relation | None
    visual: tuple[TokenSignal, ...] | None  # one for each visual token, with the most probable alternative only

    @property
    def has_signals(self) -> bool:
        """Whether the cache holds a relation matrix or visual rows of the image."""
        return self.relation is not None or bool(self.visual)


@dataclass(frozen=True, eq=False)
class SampleView:
    """A sample, ready to display."""

    sample_id: str
    split: str
    category: str
    segments: tuple[Segment, ...]
    images: tuple[ImageView, ...]

    @property
    def tokens(self) -> list[AnswerToken]:
        """All answer tokens, in order."""
        return [token for segment in self.segments for token in segment.tokens]

    @property
    def answer_text(self) -> str:
        """The texts of all answers, joined by an ellipsis."""
        return " … ".join(segment.text for segment in self.segments if segment.kind == "answer")

    @property
    def mean_entropy(self) -> float | None:
        """Nats a token over all answers; None without tokens or signals."""
        entropies = [token.signal.entropy for token in self.tokens if token.signal]
        return float(np.mean(entropies)) if entropies else None

    @property
    def least_sure_token(self) -> AnswerToken | None:
        """The answer token with the largest entropy among those with alternatives, if there are any."""
        tokens = [token for token in self.tokens if token.signal and token.signal.alternatives]
        return max(tokens, key=lambda token: token.signal.entropy if token.signal else 0.0, default=None)


def find_sample(cache: Cache, sample_id: str) -> int:
    """The position of a sample. ConfigError with the nearest ids, or with the reason why it has no record."""
    try:
        return cache.index_of(sample_id)
    except KeyError:
        pass
    for error in cache.errors:
        if error.sample_id == sample_id:
            raise ConfigError(f"{cache.folder}: sample {sample_id!r} has no record: {error.reason}")
    nearest = ", ".join(map(repr, find_nearest_ids(sample_id, cache.sample_ids))) or "none, since the cache is empty"
    raise ConfigError(f"{cache.folder}: no sample {sample_id!r} among {cache.num_samples:,}; nearest: {nearest}")


def find_nearest_ids(wanted: str, sample_ids: Sequence[str]) -> list[str]:
    """The ids most like `wanted`, among those that share the most characters at both ends with it."""

    def count_shared(sample_id: str) -> int:
        return _count_equal(wanted, sample_id) + _count_equal(wanted[::-1], sample_id[::-1])

    candidates = nlargest(MAX_COMPARED_IDS, sample_ids, key=count_shared)
    return get_close_matches(wanted, candidates, n=NUM_NEAREST_IDS, cutoff=0.0)


def _count_equal(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    different = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def build_sample_view(cache: Cache, index: int, texts: TokenTexts) -> SampleView:
    """The view of the sample at a position of the cache. Errors as Cache.read."""
    record = cache.read(index)
    tokens = record.tokens
    return SampleView(
        sample_id=tokens.sample_id,
        split=tokens.split,
        category=tokens.category,
        segments=_split_segments(tokens, record.response, texts, cache.identity.image_token_id),
        images=tuple(_build_image_view(cache, record, image, texts) for image in tokens.images),
    )


def make_signals(rows: SparseRows, texts: TokenTexts, *, max_exact: int) -> list[TokenSignal]:
    """The signal of each row, with at most `max_exact` exact alternatives and the likeliest sampled ones."""
    probabilities = np.exp(rows.logprobs.astype(np.float64))

    def make_alternative(entry: int, *, sampled: bool) -> Alternative:
        token_id = int(rows.ids[entry])
        return Alternative(token_id, texts.describe_token(token_id), float(probabilities[entry]), sampled)

    signals = []
    for row in range(rows.num_rows):
        start, stop = int(rows.offsets[row]), int(rows.offsets[row + 1])
        middle = start + int(rows.num_exact[row])
        num_likely = int(np.count_nonzero(probabilities[start:middle] >= MIN_SHOWN))
        num_shown = min(max_exact, max(NUM_EXACT_ALWAYS, num_likely))
        exact = range(start, min(middle, start + num_shown))
        sampled = middle + np.argsort(-probabilities[middle:stop], kind="stable")[:MAX_SAMPLED_SHOWN]
        alternatives = [make_alternative(entry, sampled=False) for entry in exact]
        alternatives += [make_alternative(int(entry), sampled=True) for entry in sampled]
        label_logprob = None if rows.label_logprob is None else float(rows.label_logprob[row])
        signals.append(
            TokenSignal(
                alternatives=tuple(alternatives),
                num_exact=middle - start,
                num_sampled=stop - middle,
                hidden_mass=float(probabilities[exact.stop : middle].sum()),
                tail_mass=float(rows.tail_mass[row]),
                entropy=float(rows.entropy[row]),
                label_logprob=label_logprob,
            )
        )
    return signals


def chart_bars(token: AnswerToken) -> list[ChartBar]:
    """Exact entries, exact entries that are not listed, the tail, sampled entries. The token must have a signal."""
    signal, label = token.signal, token.token_id
    assert signal is not None
    entries = signal.list_probabilities(label)
    exact = [ChartBar(entry.text, p, "exact", entry.token_id == label) for entry, p in entries if not entry.sampled]
    num_hidden = signal.num_exact - len(exact)
    hidden = [ChartBar(f"{num_hidden} more", signal.hidden_mass, "hidden")] if num_hidden else []
    sampled = [
        ChartBar(f"~ {entry.text}", weight, "sampled", entry.token_id == label)
        for entry, weight in entries
        if entry.sampled
    ]
    return [*exact, *hidden, ChartBar("tail", signal.tail_mass, "tail"), *sampled]


def summarise_relation(matrix: Relation) -> RelationSummary:
    """Numbers of a relation matrix; all 0 for a matrix of zeros."""
    values = matrix.values
    return RelationSummary(
        num_rows=len(values),
        norm=matrix.norm,
        smallest=float(values.min()),
        mean=float(values.mean()),
        largest=float(values.max()),
        effective_rank=float(np.trace(values)) ** 2,
    )


def convert_view(view: SampleView) -> dict[str, Any]:
    """The view in JSON types, with relation matrices as their summaries."""
    images = [
        {
            **asdict(image.image),
            "num_sharing": image.num_sharing,
            "relation": asdict(summarise_relation(image.relation)) if image.relation else None,
            "visual": None if image.visual is None else [asdict(signal) for signal in image.visual],
        }
        for image in view.images
    ]
    segments = [asdict(segment) for segment in view.segments]
    return {
        "sample_id": view.sample_id, "split": view.split, "category": view.category,
        "mean_entropy": view.mean_entropy, "segments": segments, "images": images,
    }  # fmt: skip


def _split_segments(
    tokens: TokensRecord, response: SparseRows | None, texts: TokenTexts, image_token_id: int
) -> tuple[Segment, ...]:
    is_image = tokens.token_ids == image_token_id
    kinds = np.where(tokens.response_mask, "answer", np.where(is_image, "image", "prompt"))
    signals = None if response is None else iter(make_signals(response, texts, max_exact=MAX_EXACT_SHOWN))
    cuts = np.flatnonzero((kinds[1:] != kinds[:-1]) | (kinds[1:] == "image")) + 1
    segments, num_images = [], 0
    for run in np.split(np.arange(len(kinds)), cuts):
        ids = tokens.token_ids[run].tolist()
        kind = str(kinds[run[0]]) if len(run) else "prompt"
        if kind == "image":
            num_images += 1
            segments.append(Segment("image", str(num_images)))
        elif kind == "answer":
            answer = tuple(
                AnswerToken(token_id, text, next(signals) if signals else None)
                for token_id, text in zip(ids, texts.describe_tokens(ids), strict=True)
            )
            segments.append(Segment("answer", texts.decode(ids), answer))
        elif ids:
            segments.append(Segment("prompt", texts.decode(ids)))
    return tuple(segments)


def _build_image_view(cache: Cache, record: SampleRecord, image: ImageRef, texts: TokenTexts) -> ImageView:
    rows = record.visual.get(image.key)
    signals = None if rows is None else make_signals(rows, texts, max_exact=1)
    return ImageView(
        image=image,
        num_sharing=cache.count_samples_showing(image.key),
        relation=record.relation.get(image.key),
        visual=None if signals is None else tuple(map(_keep_first_alternative, signals)),
    )


def _keep_first_alternative(signal: TokenSignal) -> TokenSignal:
    return replace(signal, alternatives=signal.alternatives[:1])
