"""The entries of a block of sparse rows as arrays, and every check of them that decoding and verifying share.

Rows are neither put in order nor made here. Legend: r rows, k entries of one set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from storage.encoding.bit_packing import bytes_of_bits, field_stops, unpack_bits
from storage.encoding.id_groups import IdGroups
from storage.encoding.rounding import count_ties, level_table
from storage.encoding.row_block_header import Header, Planes, level_type, read_header
from storage.errors import CorruptPartError
from storage.records.sparse_rows import HEAD_TOLERANCE

GROUP_BITS = 8  # that hold a group
GROUP_MASK = (1 << GROUP_BITS) - 1

SetName = Literal["exact", "sampled"]


@dataclass(frozen=True, eq=False)
class RankedEntries:
    """Entries of a block's rows, exact or sampled, each row's in the order of ranks."""

    counts: NDArray[np.int64]  # (r,)
    starts: NDArray[np.int64]  # (r,) where each row's entries begin
    keys: NDArray[np.int64]  # (k,) the row and the group of each
    ranks: NDArray[np.int32]  # (k,) see IdGroups


def open_planes(block: bytes | memoryview, num_rows: int, draw_set: int) -> tuple[Header, Planes]:
    """The header and planes of a block of `num_rows` rows, for one of its sets. Errors: CorruptPartError."""
    view = memoryview(block).cast("B")
    header = read_header(view, draw_set)
    if header.num_rows != num_rows:
        raise CorruptPartError(f"the block has {header.num_rows} rows, its scalar columns have {num_rows}")
    return header, Planes(view, header)


def read_counts(name: SetName, header: Header, planes: Planes) -> NDArray[np.int64]:
    """(r,) how many entries of a set each row has. Errors: CorruptPartError."""
    counts = planes.take(f"num_{name}", f"<u{header.length_bytes}", header.num_rows).astype(np.int64)
    if counts.sum() != (header.num_exact if name == "exact" else header.num_sampled):
        raise CorruptPartError("the block's row lengths do not sum to its header's totals")
    return counts


def sum_groups(
    differences: NDArray[np.uint8], counts: NDArray[np.int64], groups: IdGroups, *, num_sets: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(k,) each entry's row and group as one number, where each row's entries stop, and the group of its last one.

    `counts` of the rows of a set, or of `num_sets` one after another. Groups start anew in each row, and never fall.
    Errors: CorruptPartError for a group that there is not.
    """
    stops = np.cumsum(counts)
    sums = np.zeros(len(differences) + 1, np.int64)
    np.cumsum(differences, out=sums[1:])
    before = sums.take(stops - counts)
    last_groups = sums.take(stops) - before
    if len(differences) and (largest := int(last_groups.max())) >= len(groups.sizes):
        raise CorruptPartError(f"the block has the id group {largest} of {len(groups.sizes)}")
    keys = sums[1:]
    before = before.reshape(num_sets, -1)
    rows = np.arange(before.shape[1]) << GROUP_BITS
    keys += np.repeat((rows - before).ravel(), counts)
    return keys, stops, last_groups


def read_entries(name: SetName, header: Header, planes: Planes, groups: IdGroups) -> RankedEntries:
    """One set of a block's entries, after the checks of its ids. Errors: CorruptPartError."""
    counts = read_counts(name, header, planes)
    differences = planes.take(f"{name}_groups", "u1", int(counts.sum()))
    keys, stops, _ = sum_groups(differences, counts, groups)
    group = keys & GROUP_MASK
    widths = groups.widths.take(group)
    ends = field_stops(widths)
    packed = planes.take(f"{name}_places", "u1", bytes_of_bits(int(ends[-1]) if len(ends) else 0))
    places = unpack_bits(packed, widths, ends)
    ranks = groups.starts.take(group)
    ranks += places
    partial = np.flatnonzero(group >= groups.first_partial)
    if not _ascends(ranks, stops - counts) or (places.take(partial) >= groups.sizes.take(group.take(partial))).any():
        raise CorruptPartError("the block's ids are not ascending places in their groups")
    return RankedEntries(counts, stops - counts, keys, ranks)


def check_common_ids(exact: RankedEntries, sampled: RankedEntries) -> None:
    """CorruptPartError if a row has one id in both sets."""
    keys = np.concatenate([(each.keys >> GROUP_BITS << 31) | each.ranks for each in (exact, sampled)])
    keys.sort(kind="stable")  # two ascending runs: one merge
    if (keys[1:] == keys[:-1]).any():
        raise CorruptPartError("the block has an id twice in one row")


def read_draws(header: Header, planes: Planes) -> NDArray:
    """(k,) the draws of each sampled entry, one less than they are. Errors: CorruptPartError."""
    draws = planes.take("draws", f"<u{header.draw_bytes}", header.num_sampled)
    if header.num_sampled and int(draws.max()) + 1 > 2 / header.tau:
        raise CorruptPartError(f"the block has {int(draws.max()) + 1} draws of weight {header.tau} for one entry")
    return draws


def read_exact_values(
    header: Header, planes: Planes, num_exact: NDArray[np.int64]
) -> tuple[NDArray, NDArray[np.int64]]:
    """(k,) levels, or float32 logprobs where the step is 0; (r,) which of a row's most probable entries is its first.

    Errors: CorruptPartError for values that no entry may have.
    """
    if header.step == 0:
        values = planes.take("values", "<f4", header.num_exact)
        if not (np.isfinite(values) & (values <= 0)).all():
            raise CorruptPartError("the block has an exact logprob above 0 or not finite")
    else:
        values = planes.take("values", level_type(header.step)[0], header.num_exact)
        if header.lowest == 0 and values.min(initial=1) == 0:
            raise CorruptPartError("the block has an exact entry of probability 0")
    first_choices = planes.take("first_choices", f"<u{header.length_bytes}", header.num_rows).astype(np.int64)
    moved = np.flatnonzero(first_choices)  # few rows; in others the first of the most probable entries is chosen
    if len(moved):
        counts = num_exact.take(moved)
        before = np.cumsum(counts) - counts
        places = np.arange(int(counts.sum())) + np.repeat(np.cumsum(num_exact).take(moved) - counts - before, counts)
        ties = count_ties(falling_values(values.take(places), header), counts)
        if (first_choices.take(moved) >= ties).any():
            raise CorruptPartError("the block's first choice of a row is none of its most probable entries")
    return values, first_choices


def falling_values(values: NDArray, header: Header) -> NDArray:
    """Values of exact entries as unsigned numbers that sort by falling probability."""
    if header.step == 0:
        return np.abs(values).view(np.uint32)  # floats of one sign sort as their bits
    return level_type(header.step)[1] - values


def head_masses(header: Header, values: NDArray, num_exact: NDArray[np.int64]) -> NDArray[np.float64]:
    """(r,) what each row's exact entries sum to, before they are rescaled."""
    if header.step == 0:
        return sum_rows(np.exp(values.astype(np.float64)), num_exact)
    return sum_rows(level_table(header.step, header.lowest).take(values), num_exact)


def mass_tolerance(header: Header, num_exact: NDArray[np.int64]) -> NDArray[np.float64]:
    """(r,) how far rounding may have moved what a row's exact entries sum to."""
    if header.step == 0:
        return np.full(header.num_rows, HEAD_TOLERANCE * 2)
    # Rounding moves a root by up to a step.
    return 2 * header.step * np.sqrt(num_exact) + header.step**2 * num_exact + HEAD_TOLERANCE


def check_masses(
    masses: NDArray[np.float64],
    tolerance: NDArray[np.float64],
    num_exact: NDArray[np.int64],
    tail_mass: NDArray[np.float32],
) -> None:
    """CorruptPartError unless the sums of rows' exact entries are 1 - tail_mass, as far as rounding allows."""
    if not ((tail_mass >= 0) & (tail_mass <= 1)).all():
        raise CorruptPartError("a tail mass is outside 0..1")
    wanted = 1.0 - tail_mass.astype(np.float64)
    if (np.abs(masses - wanted) > tolerance).any():
        raise CorruptPartError("the block's exact entries and the tail masses do not sum to 1")
    if ((wanted <= 0) & (num_exact > 0)).any():
        raise CorruptPartError("a tail mass is 1 beside exact entries")


def sum_rows(values: NDArray, counts: NDArray[np.int64]) -> NDArray:
    """(r,) the sums of `counts` values one after another: of floats in float64, of others whole."""
    kind = np.float64 if values.dtype.kind == "f" else np.int64
    sums = np.zeros(len(values) + 1, kind)
    np.cumsum(values, dtype=kind, out=sums[1:])
    stops = np.cumsum(counts)
    return sums.take(stops) - sums.take(stops - counts)


def _ascends(ranks: NDArray[np.int32], starts: NDArray[np.int64]) -> bool:
    """Whether each row's ranks ascend."""
    rises = np.ones(len(ranks) + 1, np.bool_)
    np.greater(ranks[1:], ranks[:-1], out=rises[1:-1])
    rises[starts] = True
    return bool(rises.all())
