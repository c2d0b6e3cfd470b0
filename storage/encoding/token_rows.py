"""Decodes a row group of the family tokens into flat arrays and checks all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.encoding.arrow_rows import check_token_ids, decode_keys
from storage.errors import CorruptPartError
from storage.identity import Identity
from storage.records.records import ImageRef, TokensRecord
from storage.records.sample_key import SampleKey

_IMAGE_COLUMNS = ("image_paths", "image_sha256s", "image_visual_tokens", "image_keys")
_SAMPLE_BYTES, _IMAGE_BYTES = 400, 800  # approximate size of the Python objects for one


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The conversations of s samples as flat arrays. Legend: t tokens of all samples."""

    keys: Sequence[SampleKey]
    splits: Sequence[str]
    categories: Sequence[str]
    starts: Sequence[int]  # s + 1, into the tokens
    token_ids: NDArray[np.int32]  # (t,)
    response_mask: NDArray[np.bool_]  # (t,)
    num_response_tokens: Sequence[int]  # s
    images: Sequence[tuple[ImageRef, ...]]  # s

    @property
    def num_bytes(self) -> int:
        """Returns the approximate size in memory."""
        num_images = sum(map(len, self.images))
        arrays = self.token_ids.nbytes + self.response_mask.nbytes
        return arrays + _SAMPLE_BYTES * len(self.keys) + _IMAGE_BYTES * num_images

    def record(self, index: int) -> TokensRecord:
        """Returns one sample's record; its arrays are views."""
        tokens = slice(self.starts[index], self.starts[index + 1])
        return TokensRecord(
            key=self.keys[index],
            split=self.splits[index],
            category=self.categories[index],
            token_ids=self.token_ids[tokens],
            response_mask=self.response_mask[tokens],
            images=self.images[index],
        )


def decode_tokens(table: pa.Table, identity: Identity) -> TokenRows:
    """Decodes all rows of a tokens table; equal to arrow_rows.decode_tokens_row of each.

    CorruptPartError (or ValueError) where spans, ids or paths of any row are out of bounds.
    """
    starts, token_ids = _read_lists(table, "token_ids")
    lengths = np.diff(starts)
    check_token_ids(token_ids, identity)
    _check_rows("num_tokens is not the number of token ids", table["num_tokens"].to_numpy() == lengths)
    mask, num_response_tokens = _decode_mask(table, starts)
    _check_rows(
        "num_response_tokens is not what the spans hold", table["num_response_tokens"].to_numpy() == num_response_tokens
    )
    columns = [table[name].to_pylist() for name in _IMAGE_COLUMNS]
    images = [
        tuple(ImageRef(*each) for each in zip(*lists, strict=True)) if lists[0] or any(lists) else ()
        for lists in zip(*columns, strict=True)
    ]
    placeholders = _sum_spans(token_ids == identity.image_token_id, starts)
    counts = np.array([len(refs) for refs in images], np.int64)
    _check_rows("the number of image placeholders is not that of its images", placeholders == counts)
    return TokenRows(
        keys=decode_keys(table),
        splits=table["split"].to_pylist(),
        categories=table["category"].to_pylist(),
        starts=starts.tolist(),
        token_ids=token_ids,
        response_mask=mask,
        num_response_tokens=num_response_tokens.tolist(),
        images=images,
    )


def _decode_mask(table: pa.Table, starts: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Returns (t,) the response mask and (s,) the number of response tokens of each sample."""
    spans, firsts = _read_lists(table, "response_starts")
    others, stops = _read_lists(table, "response_stops")
    _check_rows("as many response spans must start as stop", np.diff(spans) == np.diff(others))
    sample = np.repeat(np.arange(len(starts) - 1), np.diff(spans))
    within = (firsts >= 0) & (firsts < stops) & (stops <= np.diff(starts)[sample])
    apart = np.ones(len(sample), np.bool_)
    apart[1:] = (sample[1:] != sample[:-1]) | (firsts[1:] > stops[:-1])
    _check_rows("response spans are not ascending within its tokens", within & apart, sample)
    edges = np.zeros(int(starts[-1]) + 1, np.int8)
    edges[firsts + starts[sample]] += 1
    edges[stops + starts[sample]] -= 1
    return np.cumsum(edges[:-1], dtype=np.int8).astype(np.bool_), _sum_spans(stops.astype(np.int64) - firsts, spans)


def _read_lists(table: pa.Table, name: str) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Returns the offsets of a list column (starting at 0, the total last) and its flat values."""
    lists = table[name].combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], lists.flatten().to_numpy(zero_copy_only=False)


def _sum_spans(values: NDArray, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
    return sums[starts[1:]] - sums[starts[:-1]]


def _check_rows(problem: str, good: NDArray[np.bool_], sample: NDArray[np.int64] | None = None) -> None:
    """Raises CorruptPartError naming the row of the first False; `sample`: the row of each position, if not itself."""
    if not good.all():
        index = int(np.argmin(good))
        raise CorruptPartError(f"row {index if sample is None else int(sample[index])} of the row group: {problem}")
