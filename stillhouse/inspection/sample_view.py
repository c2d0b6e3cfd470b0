"""What a cache holds of one sample, ready to be shown: its conversation, its answers token by token, its images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from heapq import nlargest
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stillhouse.inspection.token_texts import TokenTexts
from storage.errors import ConfigError
from storage.reader.cache import Cache
from storage.records.records import ImageRef, Relation, SampleRecord, TokensRecord
from storage.records.sparse_rows import SparseRows

NUM_EXACT_SHOWN = 6  # alternatives of a token, at most
NUM_EXACT_ALWAYS = 2  # of them however improbable; others from MIN_SHOWN on
MIN_SHOWN = 0.001  # probability
NUM_SAMPLED_SHOWN = 3
NUM_NEAREST_IDS = 3
MAX_COMPARED_IDS = 500  # in full, by difflib


@dataclass(frozen=True)
class Alternative:
    """A stored entry of the teacher's distribution."""

    token_id: int
    text: str
    probability: float  # of a sampled entry its weight: draws times tau
    sampled: bool


@dataclass(frozen=True)
class Signal:
    """What the teacher believed at one token. exact + hidden + tail is 1: `tail_mass` lies outside of exact entries."""

    alternatives: tuple[Alternative, ...]  # exact ones by falling probability, then sampled ones by falling weight
    num_exact: int  # stored; the first few are alternatives
    num_sampled: int
    hidden_mass: float  # of exact entries that are stored, but are no alternatives
    tail_mass: float
    entropy: float  # nats
    label_logprob: float | None  # nats; None for a visual token, which has no label

    def shown(self, label_id: int) -> list[tuple[Alternative, float]]:
        """The alternatives with the probabilities to show: of the label the exact one, of others what was stored.

        A stored probability is rounded, and a reader who sees 7.9 % in a text and 7.3 % at a bar trusts neither. Exact
        entries by falling probability, then sampled ones, whose number is a weight and stays.
        """

        def probability(entry: Alternative) -> float:
            if entry.token_id != label_id or entry.sampled or self.label_logprob is None:
                return entry.probability
            return math.exp(min(0.0, self.label_logprob))

        pairs = [(entry, probability(entry)) for entry in self.alternatives]
        return sorted(pairs, key=lambda pair: (pair[0].sampled, 0.0 if pair[0].sampled else -pair[1]))


@dataclass(frozen=True)
class AnswerToken:
    """One token under the response mask; no signal in a cache without the family response."""

    token_id: int
    text: str
    signal: Signal | None


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
    effective_rank: float  # (sum of eigenvalues)² / sum of their squares, the square of the trace at norm 1


@dataclass(frozen=True, eq=False)
class ImageView:
    """One image with what was stored under its key, once for all samples that share it."""

    image: ImageRef
    num_sharing: int  # samples of the cache that name its key
    relation: Relation | None
    visual: tuple[Signal, ...] | None  # one a visual token, with the single most probable alternative


@dataclass(frozen=True, eq=False)
class SampleView:
    """A sample as people look at it."""

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
    def mean_entropy(self) -> float | None:
        """Nats a token, over all answers; None without tokens or signals."""
        found = [token.signal.entropy for token in self.tokens if token.signal]
        return float(np.mean(found)) if found else None


def find_sample(cache: Cache, sample_id: str) -> int:
    """The position of a sample. ConfigError with the nearest ids, or with the reason why it has no record."""
    try:
        return cache.index_of(sample_id)
    except KeyError:
        pass
    for error in cache.errors:
        if error.sample_id == sample_id:
            raise ConfigError(f"{cache.folder}: sample {sample_id!r} has no record: {error.reason}")
    shown = ", ".join(map(repr, nearest_ids(sample_id, cache.sample_ids))) or "none, since the cache is empty"
    raise ConfigError(f"{cache.folder}: no sample {sample_id!r} among {cache.num_samples:,}; nearest: {shown}")


def nearest_ids(wanted: str, sample_ids: Sequence[str]) -> list[str]:
    """The ids most like the one wanted, of those that share the most characters at both ends with it."""

    def num_shared(sample_id: str) -> int:
        return _num_equal(wanted, sample_id) + _num_equal(wanted[::-1], sample_id[::-1])

    candidates = nlargest(MAX_COMPARED_IDS, sample_ids, key=num_shared)
    return get_close_matches(wanted, candidates, n=NUM_NEAREST_IDS, cutoff=0.0)


def _num_equal(one: str, other: str) -> int:
    """Characters that two texts have in common at their beginning."""
    different = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def sample_view(cache: Cache, index: int, texts: TokenTexts) -> SampleView:
    """The sample at a position of the cache. Errors as Cache.read."""
    record = cache.read(index)
    tokens = record.tokens
    return SampleView(
        sample_id=tokens.sample_id,
        split=tokens.split,
        category=tokens.category,
        segments=_segments(tokens, record.response, texts, cache.identity.image_token_id),
        images=tuple(_image_view(cache, record, image, texts) for image in tokens.images),
    )


def signals_of(rows: SparseRows, texts: TokenTexts, *, num_exact: int) -> list[Signal]:
    """What is shown of each row: at most `num_exact` exact alternatives, and the likeliest sampled ones."""
    probabilities = np.exp(rows.logprobs.astype(np.float64))
    signals = []
    for row in range(rows.num_rows):
        start, stop = int(rows.offsets[row]), int(rows.offsets[row + 1])
        middle = start + int(rows.num_exact[row])
        num_likely = int(np.count_nonzero(probabilities[start:middle] >= MIN_SHOWN))
        num_shown = min(num_exact, max(NUM_EXACT_ALWAYS, num_likely))
        exact = range(start, min(middle, start + num_shown))
        sampled = middle + np.argsort(-probabilities[middle:stop], kind="stable")[:NUM_SAMPLED_SHOWN]
        alternatives = [_alternative(rows, probabilities, at, texts, sampled=False) for at in exact]
        alternatives += [_alternative(rows, probabilities, int(at), texts, sampled=True) for at in sampled]
        signals.append(
            Signal(
                alternatives=tuple(alternatives),
                num_exact=middle - start,
                num_sampled=stop - middle,
                hidden_mass=float(probabilities[exact.stop : middle].sum()),
                tail_mass=float(rows.tail_mass[row]),
                entropy=float(rows.entropy[row]),
                label_logprob=None if rows.label_logprob is None else float(rows.label_logprob[row]),
            )
        )
    return signals


def relation_summary(matrix: Relation) -> RelationSummary:
    """Numbers of a matrix; all 0 for a matrix of zeros."""
    values = matrix.values
    return RelationSummary(
        num_rows=len(values),
        norm=matrix.norm,
        smallest=float(values.min()),
        mean=float(values.mean()),
        largest=float(values.max()),
        effective_rank=float(np.trace(values)) ** 2,
    )


def as_json(view: SampleView) -> dict[str, Any]:
    """The view in JSON types; relation matrices as their summaries."""
    images = [
        {
            **asdict(image.image),
            "num_sharing": image.num_sharing,
            "relation": asdict(relation_summary(image.relation)) if image.relation else None,
            "visual": None if image.visual is None else [asdict(signal) for signal in image.visual],
        }
        for image in view.images
    ]
    segments = [asdict(segment) for segment in view.segments]
    return {
        "sample_id": view.sample_id, "split": view.split, "category": view.category,
        "mean_entropy": view.mean_entropy, "segments": segments, "images": images,
    }  # fmt: skip


def _segments(
    tokens: TokensRecord, response: SparseRows | None, texts: TokenTexts, image_token_id: int
) -> tuple[Segment, ...]:
    kinds = np.where(tokens.response_mask, "answer", np.where(tokens.token_ids == image_token_id, "image", "prompt"))
    signals = None if response is None else iter(signals_of(response, texts, num_exact=NUM_EXACT_SHOWN))
    cuts = np.flatnonzero((kinds[1:] != kinds[:-1]) | (kinds[1:] == "image")) + 1
    segments, num_images = [], 0
    for run in np.split(np.arange(len(kinds)), cuts):
        ids = tokens.token_ids[run].tolist()
        kind = str(kinds[run[0]]) if len(run) else "prompt"
        if kind == "image":
            num_images += 1
            segments.append(Segment("image", str(num_images)))
        elif kind == "answer":
            found = tuple(
                AnswerToken(token_id, text, next(signals) if signals else None)
                for token_id, text in zip(ids, texts.each(ids), strict=True)
            )
            segments.append(Segment("answer", texts.many(ids), found))
        elif ids:
            segments.append(Segment("prompt", texts.many(ids)))
    return tuple(segments)


def _alternative(
    rows: SparseRows, probabilities: NDArray[np.float64], at: int, texts: TokenTexts, *, sampled: bool
) -> Alternative:
    token_id = int(rows.ids[at])
    return Alternative(token_id, texts.one(token_id), float(probabilities[at]), sampled)


def _image_view(cache: Cache, record: SampleRecord, image: ImageRef, texts: TokenTexts) -> ImageView:
    rows = record.visual.get(image.key)
    visual = None if rows is None else tuple(_top_only(signal) for signal in signals_of(rows, texts, num_exact=1))
    return ImageView(
        image=image,
        num_sharing=cache.count_samples_showing(image.key),
        relation=record.relation.get(image.key),
        visual=visual,
    )


def _top_only(signal: Signal) -> Signal:
    return replace(signal, alternatives=signal.alternatives[:1])
