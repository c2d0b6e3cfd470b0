"""Blocks: the entries of many sparse rows as one small byte string. FORMAT.md has the bytes.

Each row's entries are written as two sets, exact and sampled, in the order of `IdGroups`; so an id costs
what its set leaves open, and no more. A probability is a step of its square root, rounded up or down at random
so that its mean is the probability: that costs about step^2 / 3 nats an entry, large or small. Each row's most
probable entry is marked, since rounding makes ties. Each plane of bytes is compressed by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

from storage.encoding.bit_packing import pack_bits
from storage.encoding.id_groups import IdGroups
from storage.encoding.rounding import Head, choose_step, level_table, places_of_first, round_head
from storage.encoding.row_block_entries import (
    RankedEntries,
    check_common_ids,
    check_masses,
    falling_values,
    head_masses,
    mass_tolerance,
    open_planes,
    read_draws,
    read_entries,
    read_exact_values,
)
from storage.encoding.row_block_header import MAX_ROWS, MAX_SETS, Header, pack_header
from storage.errors import CorruptPartError
from storage.records.sparse_rows import SparseRows, check_sampled_total

_ID_MASK = (1 << 31) - 1
_LEAD = np.float32(1e-6)  # nats of a first choice over entries that rounding made equal; float32 keeps it


@dataclass(frozen=True, eq=False)
class EncodedBlock:
    """A block, and what rounding cost."""

    block: bytes
    errors: NDArray[np.float64]  # (r,) KL(exact entries || decoded ones) in nats; what is not exact cancels


def encode_block(rows: SparseRows, groups: IdGroups, *, tau: float, rounding_kl: float, seed: int = 0) -> EncodedBlock:
    """The block of rows that are valid (see SparseRows.validate); their scalars are not in it.

    `tau` is the weight of one draw. `rounding_kl` (nats) is what rounding probabilities costs a row on average;
    single rows lose several times as much. With 0 they are kept as float32. `seed` decides which are rounded up.
    ValueError for rows that a block cannot hold.
    """
    sets = (rows, *rows.other_sets)
    if rows.num_rows > MAX_ROWS or len(sets) > MAX_SETS:
        raise ValueError(f"a block of {rows.num_rows} rows and {len(sets)} sets; {MAX_ROWS} and {MAX_SETS} fit")
    sampled = [_draws_of(each, tau) for each in sets]
    keys = [_make_keys(each, groups) for each in sets]
    is_exact = [each.is_exact() for each in sets]
    entries = _in_order(keys[0][is_exact[0]], groups)
    step = choose_step(rows, rounding_kl)
    exact = np.flatnonzero(is_exact[0]).take(entries.order)
    is_first = np.zeros(rows.num_entries, np.bool_)
    is_first[rows.offsets[:-1][rows.num_exact > 0]] = True
    logprobs = np.minimum(rows.logprobs.take(exact), 0)
    head = Head(logprobs, entries.row, is_first.take(exact), rows.num_rows)
    lowest, values, errors = round_head(head, step, seed)
    first_choices = places_of_first(head, values, groups.ids.take(entries.ranks), step)
    num_sampled = [np.diff(each.offsets) - each.num_exact for each in sets]
    length_bytes = _width(max(rows.num_exact.max(initial=0), *(counts.max(initial=0) for counts in num_sampled)))
    draw_bytes = _width(max(int(draws.max(initial=1)) - 1 for draws in sampled))
    lengths = rows.num_exact.astype(f"<u{length_bytes}")
    first_choices = first_choices.astype(f"<u{length_bytes}")
    planes = [_packed((lengths, *entries.planes(rows.num_exact), values, first_choices))]
    for of_set, are_exact, counts, draws in zip(keys, is_exact, num_sampled, sampled, strict=True):
        drawn = _in_order(of_set[~are_exact], groups)
        shown = (draws.take(drawn.order) - 1).astype(f"<u{draw_bytes}")
        planes.append(_packed((counts.astype(f"<u{length_bytes}"), *drawn.planes(counts), shown)))
    header = pack_header(
        length_bytes, draw_bytes, num_rows=rows.num_rows, num_exact=len(values),
        num_sampled=[len(draws) for draws in sampled], tau=tau, step=step, lowest=lowest,
        plane_bytes=[[len(plane) for plane in of_set] for of_set in planes],
    )  # fmt: skip
    return EncodedBlock(b"".join([header, *(plane for of_set in planes for plane in of_set)]), errors)


@dataclass(frozen=True, eq=False)
class _Ordered:
    """Some entries of rows, each row's a set in the order of ranks."""

    order: NDArray[np.int64]  # of the entries as they were
    row: NDArray[np.int64]
    ranks: NDArray[np.int64]
    group: NDArray[np.uint8]
    places: NDArray[np.int32]
    widths: NDArray[np.int32]  # bits of each place

    def planes(self, counts: NDArray) -> tuple[NDArray, bytes]:
        """Groups as differences, and places as bit fields; `counts` entries in each row."""
        return _differences(self.group, counts), pack_bits(self.places, self.widths)


def _make_keys(rows: SparseRows, groups: IdGroups) -> NDArray[np.int64]:
    """(k,) the row and the rank of each entry as one number."""
    ranks = groups.ranks.take(rows.ids)
    if (ranks < 0).any():
        raise ValueError(f"id {rows.ids[np.argmin(ranks)]} is in no group")
    return (rows.row_of_entry() << 31) | ranks


def _in_order(keys: NDArray[np.int64], groups: IdGroups) -> _Ordered:
    order = np.argsort(keys)
    ranks = keys.take(order) & _ID_MASK
    group = groups.table.take(groups.ids.take(ranks)) - np.uint8(1)
    places = ranks.astype(np.int32) - groups.starts.take(group)
    return _Ordered(order, keys.take(order) >> 31, ranks, group, places, groups.widths.take(group))


def _packed(planes: Sequence[NDArray | bytes]) -> list[bytes]:
    compressor = zstandard.ZstdCompressor(level=1)  # Huffman codes do the work: longer searches find nothing
    contents = [plane if isinstance(plane, bytes) else plane.tobytes() for plane in planes]
    return [compressor.compress(content) if content else b"" for content in contents]


def decode_block(
    block: bytes | memoryview,
    groups: IdGroups,
    *,
    tail_mass: NDArray[np.float32],
    entropy: NDArray[np.float32],
    log_sum_exp: NDArray[np.float32],
    label_logprob: NDArray[np.float32] | None = None,
    draw_set: int = 0,
) -> SparseRows:
    """The rows of a block, beside their scalars. The exact entries of each row sum to 1 - tail_mass, and
    the first is the most probable one, also where rounding made others as large.

    Sampled entries are those of `draw_set`, modulo the number of sets; the others are not decompressed.
    Errors: CorruptPartError for any bytes that are not the block of as many valid rows.
    """
    header, planes = open_planes(block, len(tail_mass), draw_set)
    exact, sampled = (read_entries(name, header, planes, groups) for name in ("exact", "sampled"))
    check_common_ids(exact, sampled)
    draws = read_draws(header, planes)
    num_exact, num_sampled = exact.counts, sampled.counts
    values, first_choices = read_exact_values(header, planes, num_exact)
    shift = _shift(header, values, num_exact, tail_mass)
    if len(entropy) != len(tail_mass):
        raise CorruptPartError(f"there are {len(tail_mass)} tail masses and {len(entropy)} entropies")
    rows = np.arange(header.num_rows, dtype=np.int64) << 31
    exact_ids, exact_logprobs = _sorted_exact(np.repeat(rows, num_exact), groups.ids.take(exact.ranks), values, header)
    sampled_ids, weights = _sorted_sampled(
        np.repeat(rows, num_sampled), groups.ids.take(sampled.ranks), draws, header.tau
    )
    exact_logprobs += np.repeat(shift, num_exact)
    _put_first(exact_ids, exact_logprobs, exact, first_choices, is_rounded=header.step > 0)
    # Row by row: its exact entries, then its sampled ones.
    counts = np.stack([num_exact, num_sampled], axis=1).ravel()
    is_exact = np.repeat(np.tile(np.array([True, False]), len(num_exact)), counts)
    all_ids, logprobs = np.empty(len(is_exact), np.int32), np.empty(len(is_exact), np.float32)
    all_ids[is_exact], all_ids[~is_exact] = exact_ids, sampled_ids
    logprobs[is_exact], logprobs[~is_exact] = exact_logprobs, weights
    return SparseRows(
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(num_exact + num_sampled)]),
        ids=all_ids,
        logprobs=logprobs,
        num_exact=num_exact.astype(np.int32),
        tail_mass=tail_mass,
        entropy=entropy,
        log_sum_exp=log_sum_exp,
        label_logprob=label_logprob,
    )


def _shift(
    header: Header, values: NDArray, num_exact: NDArray[np.int64], tail_mass: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What to add to each row's exact logprobs so that they sum to 1 - tail_mass. Errors: CorruptPartError."""
    masses = head_masses(header, values, num_exact)
    check_masses(masses, mass_tolerance(header, num_exact), num_exact, tail_mass)
    has_head = num_exact > 0
    shift = np.zeros(header.num_rows)
    shift[has_head] = np.log((1.0 - tail_mass[has_head].astype(np.float64)) / masses[has_head])
    return shift.astype(np.float32)


def _sorted_exact(
    row: NDArray, ids: NDArray[np.int32], values: NDArray, header: Header
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and logprobs by row, by falling probability, by id. `row` is shifted by 31 bits."""
    falling = falling_values(values, header)
    if header.step == 0:
        order = np.lexsort((ids, falling, row))
        return ids[order], values[order]
    # All of the key fits into 63 bits: sorting it is the whole work.
    bits = 8 * falling.itemsize
    keys = (row << bits) | (falling.astype(np.int64) << 31) | ids
    keys.sort()
    with np.errstate(divide="ignore"):
        logs = np.log(level_table(header.step, header.lowest)).astype(np.float32)
    return (keys & _ID_MASK).astype(np.int32), logs[::-1].take((keys >> 31) & (len(logs) - 1))


def _sorted_sampled(row: NDArray, ids: NDArray, draws: NDArray, tau: float) -> tuple[NDArray[np.int32], NDArray]:
    """Ids and logarithms of weights by row, by id. `row` is shifted by 31 bits, `draws` are one less than they are."""
    keys = row | ids
    if draws.max(initial=0) == 0:
        keys.sort()
        return (keys & _ID_MASK).astype(np.int32), np.full(len(ids), np.log(tau) if len(ids) else 0, np.float32)
    order = np.argsort(keys)
    return ids[order], np.log((draws[order] + 1.0) * tau).astype(np.float32)


def _put_first(
    ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    exact: RankedEntries,
    first_choices: NDArray[np.int64],
    *,
    is_rounded: bool,
) -> None:
    """Moves each row's first choice before the entries that rounding made as probable, and raises it above them."""
    starts = exact.starts
    moves = first_choices > 0
    place, start = first_choices[moves], starts[moves]
    if len(start):
        # Each run of tied entries up to the first choice turns by one place.
        within = np.arange(int((place + 1).sum())) - np.repeat(np.cumsum(place + 1) - place - 1, place + 1)
        to = np.repeat(start, place + 1) + within
        ids[to] = ids[np.where(within == 0, np.repeat(start + place, place + 1), to - 1)]
    if is_rounded:
        several = starts[exact.counts > 1]
        tied = several[logprobs[several] == logprobs[several + 1]]
        logprobs[tied] += np.maximum(_LEAD, 4 * np.spacing(np.abs(logprobs[tied])))


def _draws_of(rows: SparseRows, tau: float) -> NDArray[np.int64]:
    """The number of draws of each sampled entry. ValueError unless they make up each row's tail."""
    check_sampled_total(rows, tau)
    exact = rows.is_exact()
    if exact.all():
        return np.zeros(0, np.int64)
    if not 0 < tau < 1:
        raise ValueError(f"rows hold sampled entries, but tau is {tau}; expected a probability")
    draws = np.exp(rows.logprobs[~exact].astype(np.float64)) / tau
    counts = np.rint(draws)
    if (counts < 1).any() or (draws > 2 / tau).any() or (np.abs(draws - counts) > 1e-3 * counts).any():
        raise ValueError(f"a sampled entry's weight is not a whole multiple of tau = {tau}")
    return counts.astype(np.int64)


def _differences(group: NDArray[np.uint8], counts: NDArray[np.int64] | NDArray[np.int32]) -> NDArray[np.uint8]:
    """Each entry's group less that of the entry before it in its row."""
    differences = np.diff(group, prepend=0)
    starts = (np.cumsum(counts) - counts)[counts > 0]
    differences[starts] = group[starts]
    return differences.astype(np.uint8)


def _width(largest: int) -> int:
    return 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4
