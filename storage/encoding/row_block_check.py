"""Checks a block of sparse rows without making its rows, in a fraction of the time that decoding takes.

An id is a group and a place in it, and most places need no look: within a row groups never fall, so an entry whose
group is above that of the entry before it has the higher rank, and an entry whose group is not among the row's
entries of the other set is in the row once. Legend: r rows, k entries (exact ones, then the sampled ones of a set).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from storage.encoding.bit_packing import bytes_of_bits, field_stops, unpack_bits
from storage.encoding.id_groups import IdGroups
from storage.encoding.row_block_entries import (
    GROUP_BITS,
    GROUP_MASK,
    check_masses,
    head_masses,
    mass_tolerance,
    open_planes,
    read_counts,
    read_draws,
    read_exact_values,
    sum_groups,
    sum_rows,
)
from storage.encoding.row_block_header import Header, Planes
from storage.errors import CorruptPartError
from storage.records.sparse_rows import check_sampled_weights

_SUM_TOLERANCE = 1e-9  # probability; far above what the order of a sum's terms changes


def check_block(block: bytes | memoryview, groups: IdGroups, *, tail_mass: NDArray[np.float32], tau: float) -> None:
    """All that `decode_block`, `SparseRows.validate` and `check_sampled_total` find in a block.

    The rows' scalars besides `tail_mass` are the affair of sparse_rows.check_scalars.
    Errors: CorruptPartError, ValueError.
    """
    header, planes = open_planes(block, len(tail_mass), 0)
    num_exact = read_counts("exact", header, planes)
    for draw_set in range(header.num_sets):
        if draw_set:
            header, planes = open_planes(block, len(tail_mass), draw_set)
        num_sampled = read_counts("sampled", header, planes)
        _check_ids(header, planes, groups, np.concatenate([num_exact, num_sampled]))
        draws = read_draws(header, planes)
        if draw_set == 0:
            _check_head(header, planes, num_exact, tail_mass)
        if tau > 0:
            num_draws = num_sampled  # of which each is of one entry, most often
            if draws.max(initial=0) > 0:
                num_draws = num_sampled + sum_rows(draws, num_sampled)
            check_sampled_weights(num_draws * header.tau, tail_mass, tau)


def _check_ids(header: Header, planes: Planes, groups: IdGroups, counts: NDArray[np.int64]) -> None:
    """CorruptPartError unless the ids of each of the (2 r,) sets of entries ascend, and no row has one twice."""
    split = header.num_exact
    exact_groups = planes.take("exact_groups", "u1", split)
    differences = np.concatenate([exact_groups, planes.take("sampled_groups", "u1", header.num_sampled)])
    keys, stops, last_groups = sum_groups(differences, counts, groups, num_sets=2)
    widths = groups.widths.take(keys & GROUP_MASK)
    ends = field_stops(widths)
    exact_bits = int(ends[split - 1]) if split else 0
    num_bits = int(ends[-1]) if len(ends) else 0
    exact_places = planes.take("exact_places", "u1", bytes_of_bits(exact_bits))
    sampled_places = planes.take("sampled_places", "u1", bytes_of_bits(num_bits - exact_bits))

    follows = differences == 0  # the entry before is of the same group, or of another row
    follows[:-1] |= follows[1:]
    if groups.first_partial == len(groups.sizes) - 1:  # a row's last entry has the highest place
        ends_so = (last_groups == groups.first_partial) & (counts > 0)
        follows[stops[ends_so] - 1] = True
    elif groups.first_partial < len(groups.sizes):
        follows |= (keys & GROUP_MASK) >= groups.first_partial
    at = _find_doubtful(keys, follows, split, header.num_rows)

    cut = int(np.searchsorted(at, split))  # exact ones before it
    ends = ends.take(at)
    ends[cut:] += 8 * len(exact_places) - exact_bits  # each plane is padded to whole bytes
    places = unpack_bits(np.concatenate([exact_places, sampled_places]), widths.take(at), ends)
    keys = keys.take(at)
    group = keys & GROUP_MASK
    ranks = (keys >> GROUP_BITS << 31) | (groups.starts.take(group) + places)
    rises = ranks[1:] > ranks[:-1]
    rises[cut - 1 : cut] = True  # from the last exact entry to the first sampled one
    if not rises.all() or (places >= groups.sizes.take(group)).any():
        raise CorruptPartError("the block's ids are not ascending places in their groups")
    ranks.sort(kind="stable")  # two ascending runs: one merge, where other kinds take twenty times as long
    if (ranks[1:] == ranks[:-1]).any():
        raise CorruptPartError("the block has an id twice in one row")


def _find_doubtful(
    keys: NDArray[np.int64], is_doubtful: NDArray[np.bool_], split: int, num_rows: int
) -> NDArray[np.int64]:
    """Where entries are doubtful, or have the key of an entry in the other set; the first `split` are exact.

    It may find a few more of the exact ones.
    """
    exact, sampled = keys[:split], keys[split:]
    marks = np.zeros(num_rows << GROUP_BITS, np.bool_)
    marks[exact] = True
    at_sampled = np.flatnonzero(is_doubtful[split:] | marks.take(sampled))
    marks.fill(False)
    marks[sampled.take(at_sampled)] = True
    at_exact = np.flatnonzero(is_doubtful[:split] | marks.take(exact))
    return np.concatenate([at_exact, at_sampled + split])


def _check_head(header: Header, planes: Planes, num_exact: NDArray[np.int64], tail_mass: NDArray[np.float32]) -> None:
    """CorruptPartError unless the exact entries' values are good, and sum to 1 - tail_mass in each row.

    Levels are roots of probabilities in steps: their squares, whole numbers, add up faster. Where a sum is so near
    the limit that the order of adding up decides, the order is that of decoding.
    """
    values, _ = read_exact_values(header, planes, num_exact)
    tolerance = mass_tolerance(header, num_exact)
    if header.step == 0:
        masses = head_masses(header, values, num_exact)
    else:
        squares = np.square(values, dtype=np.uint16 if values.itemsize == 1 else np.uint32)
        masses = sum_rows(squares, num_exact) * header.step**2
        if header.lowest > 0:
            masses += sum_rows(values == 0, num_exact) * header.lowest
        gaps = np.abs(masses + tail_mass - 1.0)
        if (np.abs(gaps - tolerance) < _SUM_TOLERANCE).any():
            masses = head_masses(header, values, num_exact)
    check_masses(masses, tolerance, num_exact, tail_mass)
