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
from storage.encoding.rounding import Head, choose_step, count_ties, level_table, places_of_first, round_head
from storage.encoding.row_block_header import MAX_ROWS, MAX_SETS, Header, Planes, level_type, pack_header, read_header
from storage.errors import CorruptPartError
from storage.records.sparse_rows import HEAD_TOLERANCE, SparseRows, check_sampled_total, check_sampled_weights

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
    exact, logprobs = rows.is_exact(), np.minimum(rows.logprobs, 0)
    entries = _in_order(rows, exact, groups)
    step = choose_step(rows, rounding_kl)
    is_first = np.zeros(rows.num_entries, np.bool_)
    is_first[rows.offsets[:-1][rows.num_exact > 0]] = True
    head = Head(logprobs[exact][entries.order], entries.row, is_first[exact][entries.order], rows.num_rows)
    lowest, values, errors = round_head(head, step, seed)
    first_choices = places_of_first(head, values, rows.ids[exact][entries.order], step)
    num_sampled = [np.diff(each.offsets) - each.num_exact for each in sets]
    length_bytes = _width(max(rows.num_exact.max(initial=0), *(counts.max(initial=0) for counts in num_sampled)))
    draw_bytes = _width(max(int(draws.max(initial=1)) - 1 for draws in sampled))
    lengths = rows.num_exact.astype(f"<u{length_bytes}")
    first_choices = first_choices.astype(f"<u{length_bytes}")
    planes = [_packed((lengths, *entries.planes(rows.num_exact), values, first_choices))]
    for each, counts, draws in zip(sets, num_sampled, sampled, strict=True):
        drawn = _in_order(each, ~each.is_exact(), groups)
        shown = (draws[drawn.order] - 1).astype(f"<u{draw_bytes}")
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
    group: NDArray[np.uint8]
    places: NDArray[np.int32]
    widths: NDArray[np.uint8]  # bits of each place

    def planes(self, counts: NDArray) -> tuple[NDArray, bytes]:
        """Groups as differences, and places as bit fields; `counts` entries in each row."""
        return _differences(self.group, counts), pack_bits(self.places, self.widths)


def _in_order(rows: SparseRows, chosen: NDArray[np.bool_], groups: IdGroups) -> _Ordered:
    row, ids = rows.row_of_entry()[chosen], rows.ids[chosen]
    ranks = groups.ranks.take(ids)
    if (ranks < 0).any():
        raise ValueError(f"id {ids[np.argmin(ranks)]} is in no group")
    order = np.argsort((row << 31) | ranks)
    group = groups.table.take(ids.take(order)) - np.uint8(1)
    places = ranks.take(order) - groups.starts.take(group)
    return _Ordered(order, row.take(order), group, places, groups.widths.take(group))


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
    sets = _read_sets(block, groups, tail_mass, draw_set)
    num_exact, num_sampled = sets.num_exact, sets.num_sampled
    split = int(num_exact.sum(dtype=np.int64))
    if len(entropy) != len(tail_mass):
        raise CorruptPartError(f"there are {len(tail_mass)} tail masses and {len(entropy)} entropies")
    ids = groups.ids.take(sets.ranks)
    rows = np.arange(len(num_exact), dtype=np.int64) << 31
    exact_ids, exact_logprobs = _sorted_exact(np.repeat(rows, num_exact), sets.values, ids[:split])
    sampled_ids, weights = _sorted_sampled(np.repeat(rows, num_sampled), ids[split:], sets.draws, sets.tau)
    exact_logprobs += np.repeat(sets.shift, num_exact)
    _put_first(exact_ids, exact_logprobs, sets)
    # Row by row: its exact entries, then its sampled ones.
    counts = np.stack([num_exact, num_sampled], axis=1).ravel()
    is_exact = np.repeat(np.tile(np.array([True, False]), len(num_exact)), counts)
    all_ids, logprobs = np.empty(len(ids), np.int32), np.empty(len(ids), np.float32)
    all_ids[is_exact], all_ids[~is_exact] = exact_ids, sampled_ids
    logprobs[is_exact], logprobs[~is_exact] = exact_logprobs, weights
    return SparseRows(
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(num_exact + num_sampled, dtype=np.int64)]),
        ids=all_ids,
        logprobs=logprobs,
        num_exact=num_exact,
        tail_mass=tail_mass,
        entropy=entropy,
        log_sum_exp=log_sum_exp,
        label_logprob=label_logprob,
    )


def check_block(block: bytes | memoryview, groups: IdGroups, *, tail_mass: NDArray[np.float32], tau: float) -> None:
    """All that `decode_block`, `SparseRows.validate` and `check_sampled_total` find in a block, in half the time.

    Rows are not put in order, and not made; their scalars besides `tail_mass` are rows.check_scalars' affair.
    Errors: CorruptPartError, ValueError.
    """
    for draw_set in range(read_header(memoryview(block).cast("B")).num_sets):
        sets = _read_sets(block, groups, tail_mass, draw_set)
        if tau > 0:
            draws = sets.num_sampled  # of which each is of one entry, most often
            if sets.draws.max(initial=0) > 0:
                draws = draws + _row_sums(sets.draws.astype(np.float64), sets.num_sampled)
            check_sampled_weights(draws * sets.tau, tail_mass, tau)


@dataclass(frozen=True, eq=False)
class _Sets:
    """A block's entries, each row's exact ones and then each row's sampled ones, in the order of ranks."""

    num_exact: NDArray[np.int32]  # (r,)
    num_sampled: NDArray[np.int32]  # (r,)
    ranks: NDArray[np.int32]
    draws: NDArray  # one less than they are
    tau: float
    values: _Values
    shift: NDArray[np.float32]  # (r,) what to add to exact logprobs
    first_choices: NDArray[np.int64]  # (r,) places of the most probable entries


def _read_sets(block: bytes | memoryview, groups: IdGroups, tail_mass: NDArray[np.float32], draw_set: int) -> _Sets:
    """What a block holds, with one of its sets of draws, after every check. Errors: CorruptPartError."""
    view = memoryview(block).cast("B")
    header = read_header(view, draw_set)
    if header.num_rows != len(tail_mass):
        raise CorruptPartError(f"the block has {header.num_rows} rows, its scalar columns have {len(tail_mass)}")
    planes = Planes(view, header)
    num_exact = planes.take("num_exact", f"<u{header.length_bytes}", header.num_rows).astype(np.int32)
    num_sampled = planes.take("num_sampled", f"<u{header.length_bytes}", header.num_rows).astype(np.int32)
    if num_exact.sum(dtype=np.int64) != header.num_exact or num_sampled.sum(dtype=np.int64) != header.num_sampled:
        raise CorruptPartError("the block's row lengths do not sum to its header's totals")
    split, counts = header.num_exact, np.concatenate([num_exact, num_sampled])  # of each row's two sets
    group = _sums(
        np.concatenate(
            [planes.take("exact_groups", "u1", split), planes.take("sampled_groups", "u1", header.num_sampled)]
        ),
        counts,
    )
    if len(group) and group.max() >= len(groups.sizes):
        raise CorruptPartError(f"the block has the id group {group.max()} of {len(groups.sizes)}")
    widths = groups.widths.take(group)
    places = planes.take_places(widths, split)
    ranks = groups.starts.take(group) + places
    if not _ascends(ranks, counts) or (places >= groups.sizes.take(group)).any():
        raise CorruptPartError("the block's ids are not ascending places in their groups")
    if _has_twice(ranks, num_exact, num_sampled, len(groups.ids)):
        raise CorruptPartError("the block has an id twice in one row")
    draws = planes.take("draws", f"<u{header.draw_bytes}", header.num_sampled)
    if header.num_sampled and int(draws.max()) + 1 > 2 / header.tau:
        raise CorruptPartError(f"the block has {int(draws.max()) + 1} draws of weight {header.tau} for one entry")
    values = _values(planes, header, num_exact)
    shift = _shift(values, tail_mass, num_exact)
    first_choices = planes.take("first_choices", f"<u{header.length_bytes}", header.num_rows).astype(np.int64)
    if (first_choices >= np.maximum(count_ties(values.falling, num_exact), 1)).any():
        raise CorruptPartError("the block's first choice of a row is none of its most probable entries")
    return _Sets(num_exact, num_sampled, ranks, draws, header.tau, values, shift, first_choices)


@dataclass(frozen=True, eq=False)
class _Values:
    """The exact entries' probabilities of a block, before each row's are rescaled."""

    logprobs: NDArray[np.float32]
    falling: NDArray  # unsigned, sorts by falling probability
    falling_bits: int
    step: float
    present: NDArray[np.float64]  # (r,) what a row's entries sum to
    tolerance: NDArray[np.float64]  # (r,) how far rounding may have moved that


def _values(planes: Planes, header: Header, num_exact: NDArray[np.int32]) -> _Values:
    if header.step == 0:
        logprobs = planes.take("values", "<f4", header.num_exact)
        if not (np.isfinite(logprobs) & (logprobs <= 0)).all():
            raise CorruptPartError("the block has an exact logprob above 0 or not finite")
        present = _row_sums(np.exp(logprobs.astype(np.float64)), num_exact)
        falling = np.abs(logprobs).view(np.uint32)  # floats of one sign sort as their bits
        return _Values(logprobs, falling, 31, 0.0, present, np.full(header.num_rows, HEAD_TOLERANCE * 2))
    kind, max_level = level_type(header.step)
    levels = planes.take("values", kind, header.num_exact)
    table = level_table(header.step, header.lowest)
    if header.lowest == 0 and levels.min(initial=1) == 0:
        raise CorruptPartError("the block has an exact entry of probability 0")
    with np.errstate(divide="ignore"):
        logs = np.log(table).astype(np.float32)
    # Rounding moves a root by up to a step.
    tolerance = 2 * header.step * np.sqrt(num_exact) + header.step**2 * num_exact + HEAD_TOLERANCE
    present = _row_sums(table.take(levels), num_exact)
    return _Values(logs.take(levels), max_level - levels, 8 if max_level < 256 else 16, header.step, present, tolerance)


def _row_sums(values: NDArray[np.float64], counts: NDArray[np.int32]) -> NDArray[np.float64]:
    sums = np.zeros(len(values) + 1)
    np.cumsum(values, out=sums[1:])
    stops = np.cumsum(counts, dtype=np.int64)
    return sums[stops] - sums[stops - counts]


def _shift(values: _Values, tail_mass: NDArray[np.float32], num_exact: NDArray[np.int32]) -> NDArray[np.float32]:
    """What to add to each row's exact logprobs so that they sum to 1 - tail_mass."""
    if not ((tail_mass >= 0) & (tail_mass <= 1)).all():
        raise CorruptPartError("a tail mass is outside 0..1")
    wanted = 1.0 - tail_mass.astype(np.float64)
    if (np.abs(values.present - wanted) > values.tolerance).any():
        raise CorruptPartError("the block's exact entries and the tail masses do not sum to 1")
    has_head = num_exact > 0
    if (wanted[has_head] <= 0).any():
        raise CorruptPartError("a tail mass is 1 beside exact entries")
    shift = np.zeros(len(wanted))
    shift[has_head] = np.log(wanted[has_head] / values.present[has_head])
    return shift.astype(np.float32)


def _sorted_exact(row: NDArray, values: _Values, ids: NDArray) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and logprobs by row, by falling probability, by id. `row` is shifted by 31 bits."""
    if values.step > 0:  # all of the key fits into 63 bits: sorting it is the whole work
        keys = (row << values.falling_bits) | (values.falling.astype(np.int64) << 31) | ids
        keys.sort()
        by_falling = np.zeros(1 << values.falling_bits, np.float32)
        by_falling[values.falling] = values.logprobs
        return (keys & _ID_MASK).astype(np.int32), by_falling.take((keys >> 31) & (len(by_falling) - 1))
    order = np.lexsort((ids, values.falling, row))
    return ids[order], values.logprobs[order]


def _sorted_sampled(row: NDArray, ids: NDArray, draws: NDArray, tau: float) -> tuple[NDArray[np.int32], NDArray]:
    """Ids and logarithms of weights by row, by id. `row` is shifted by 31 bits, `draws` are one less than they are."""
    keys = row | ids
    if draws.max(initial=0) == 0:
        keys.sort()
        return (keys & _ID_MASK).astype(np.int32), np.full(len(ids), np.log(tau) if len(ids) else 0, np.float32)
    order = np.argsort(keys)
    return ids[order], np.log((draws[order] + 1.0) * tau).astype(np.float32)


def _put_first(ids: NDArray[np.int32], logprobs: NDArray[np.float32], sets: _Sets) -> None:
    """Moves each row's first choice before the entries that rounding made as probable, and raises it above them."""
    starts = np.cumsum(sets.num_exact, dtype=np.int64) - sets.num_exact
    moves = sets.first_choices > 0
    place, start = sets.first_choices[moves], starts[moves]
    if len(start):
        # Each run of tied entries up to the first choice turns by one place.
        within = np.arange(int((place + 1).sum())) - np.repeat(np.cumsum(place + 1) - place - 1, place + 1)
        to = np.repeat(start, place + 1) + within
        ids[to] = ids[np.where(within == 0, np.repeat(start + place, place + 1), to - 1)]
    if sets.values.step > 0:
        several = starts[sets.num_exact > 1]
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


def _sums(differences: NDArray[np.uint8], counts: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The groups of `_differences`; a sum beyond a byte wraps, which the order of ranks then shows."""
    sums = np.zeros(len(differences) + 1, np.int32)  # six times as fast as adding bytes up
    np.cumsum(differences, dtype=np.int32, out=sums[1:])
    before = sums[np.cumsum(counts, dtype=np.int64) - counts]
    sums[1:] -= np.repeat(before, counts)
    return sums[1:].astype(np.uint8)


def _ascends(ranks: NDArray[np.int32], counts: NDArray[np.int32]) -> bool:
    """Whether each of the sets, of so many ranks one after another, ascends."""
    rises = np.ones(len(ranks) + 1, np.bool_)
    rises[1:-1] = ranks[1:] > ranks[:-1]
    rises[np.cumsum(counts, dtype=np.int64) - counts] = True  # the first of a set
    return bool(rises.all())


def _has_twice(
    ranks: NDArray[np.int32], num_exact: NDArray[np.int32], num_sampled: NDArray[np.int32], num_ranks: int
) -> bool:
    """Whether a row's exact and sampled ranks, each of which ascend, have one in common."""
    wide = np.int32 if len(num_exact) * num_ranks < 1 << 31 else np.int64
    rows = np.arange(len(num_exact), dtype=wide) * wide(num_ranks)
    keys = np.concatenate([np.repeat(rows, num_exact), np.repeat(rows, num_sampled)])
    keys += ranks
    keys.sort(kind="stable")  # two ascending runs: one merge
    return bool((keys[1:] == keys[:-1]).any())


def _width(largest: int) -> int:
    return 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4
