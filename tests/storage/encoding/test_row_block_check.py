"""The check of a block against a slow reader of blocks, entry by entry, that is written from FORMAT.md alone."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.encoding.id_groups import IdGroups
from storage.encoding.row_block import decode_block, encode_block
from storage.encoding.row_block_check import check_block
from storage.errors import CorruptPartError
from storage.records.sparse_rows import SparseRows
from tests.hypothesis_profiles import examples

VOCAB_SIZE = 40
TAU = 1 / 16
NUM_ROWS = 6


@dataclass(frozen=True)
class SlowRow:
    """A row's entries as {id: value}; None where the reference refuses."""

    exact: dict[int, int]  # levels
    sampled: dict[int, int]  # draws


def planes_of(block: bytes) -> list[bytes]:
    """The decompressed planes of a block with one set of draws."""
    start, planes = 68, []
    for size in (*struct.unpack_from("<5I", block, 28), *struct.unpack_from("<4I", block, 52)):
        frame = block[start : start + size]
        planes.append(zstandard.ZstdDecompressor().decompress(frame) if frame else b"")
        start += size
    assert start == len(block)
    return planes


def block_of(block: bytes, planes: Sequence[bytes]) -> bytes:
    """The block with other planes."""
    packed = [zstandard.ZstdCompressor().compress(plane) if plane else b"" for plane in planes]
    sizes = [len(plane) for plane in packed]
    sizes_of_exact, sizes_of_set = struct.pack("<5I", *sizes[:5]), struct.pack("<4I", *sizes[5:])
    return b"".join([block[:28], sizes_of_exact, block[48:52], sizes_of_set, *packed])


def read_slowly(block: bytes, table: np.ndarray, tail_mass: np.ndarray) -> list[SlowRow] | None:
    """The rows of a block of byte-wide lengths, draws and levels, or None for one that must be refused."""
    assert (block[1], block[2], block[3]) == (1, 1, 1)
    step, lowest = struct.unpack_from("<ff", block, 20)
    num_exact, *exact_planes, firsts, num_sampled, sampled_groups, sampled_places, draws = planes_of(block)
    if (
        sum(num_exact) != struct.unpack_from("<I", block, 8)[0]
        or sum(num_sampled) != struct.unpack_from("<I", block, 48)[0]
    ):
        return None
    exact_ids = read_ids(num_exact, exact_planes[0], exact_planes[1], table)
    sampled_ids = read_ids(num_sampled, sampled_groups, sampled_places, table)
    if exact_ids is None or sampled_ids is None:
        return None
    levels, more, rows = list(exact_planes[2]), list(draws), []
    for number, tail in enumerate(tail_mass.astype(float)):
        exact = {token: levels.pop(0) for token in exact_ids[number]}
        sampled = {token: more.pop(0) + 1 for token in sampled_ids[number]}
        probabilities = [(level * step) ** 2 if level else lowest for level in exact.values()]
        ties = sum(level == max(exact.values()) for level in exact.values())
        tolerance = 2 * step * len(exact) ** 0.5 + step**2 * len(exact) + 1e-3
        if (
            set(exact) & set(sampled)
            or 0 in probabilities
            or firsts[number] >= max(ties, 1)
            or abs(sum(probabilities) - (1 - tail)) > tolerance
            or (exact and tail >= 1)
            or max(sampled.values(), default=0) > 2 / TAU
            or abs(sum(sampled.values()) * TAU - tail) > TAU + 1e-3
        ):
            return None
        rows.append(SlowRow(exact, sampled))
    return rows


def read_ids(counts: bytes, differences: bytes, places: bytes, table: np.ndarray) -> list[list[int]] | None:
    """The ids of each row in the order of ranks, or None."""
    members = [np.flatnonzero(table == group + 1).tolist() for group in range(table.max(initial=0))]
    bits = "".join(f"{byte:08b}"[::-1] for byte in places)
    rows, entry, bit = [], 0, 0
    for count in counts:
        row, group, before = [], 0, (-1, -1)
        for _ in range(count):
            group += differences[entry]
            entry += 1
            if group >= len(members):
                return None
            width = max(len(members[group]) - 1, 0).bit_length()
            place = int("0" + bits[bit : bit + width][::-1], 2)
            bit += width
            if place >= len(members[group]) or (group, place) <= before:
                return None
            before = (group, place)
            row.append(members[group][place])
        rows.append(row)
    return rows if len(places) == -(-bit // 8) else None


def make_rows(rng: np.random.Generator, *, overlap: bool) -> SparseRows:
    """Rows that decode well, but that may have an id in both sets."""
    ids, logprobs, num_exact, sizes, tails = [], [], [], [], []
    for _ in range(NUM_ROWS):
        order = rng.permutation(VOCAB_SIZE)
        exact = order[: rng.integers(0, 6)]
        num_draws = int(rng.integers(0, 9)) if len(exact) else 16
        others = rng.permutation(VOCAB_SIZE) if overlap else order[len(exact) :]
        sampled, draws = np.unique(rng.choice(others[:12], num_draws), return_counts=True)
        tail = num_draws / 16
        weights = -np.sort(-rng.uniform(0.2, 1, len(exact)))
        ids += [exact, sampled]
        logprobs += [np.log(weights / weights.sum() * (1 - tail)) if len(exact) else weights, np.log(draws * TAU)]
        num_exact.append(len(exact))
        sizes.append(len(exact) + len(sampled))
        tails.append(tail)
    return SparseRows(
        offsets=np.cumsum([0, *sizes]).astype(np.int64), ids=np.concatenate(ids).astype(np.int32),
        logprobs=np.concatenate(logprobs).astype(np.float32), num_exact=np.array(num_exact, np.int32),
        tail_mass=np.array(tails, np.float32), entropy=np.ones(NUM_ROWS, np.float32),
        log_sum_exp=np.zeros((NUM_ROWS, 0), np.float32),
    )  # fmt: skip


def make_groups(rng: np.random.Generator, *, ordered: bool) -> IdGroups:
    """Groups as a writer makes them, or any at all: of any sizes, in any order, some of them empty."""
    if ordered:
        return IdGroups.of_counts(rng.integers(1, 1000, VOCAB_SIZE))
    return IdGroups(rng.integers(1, rng.integers(2, 30), VOCAB_SIZE).astype(np.uint8))


def refusal(block: bytes, groups: IdGroups, tail_mass: np.ndarray) -> str | None:
    try:
        check_block(block, groups, tail_mass=tail_mass, tau=TAU)
    except (CorruptPartError, ValueError) as error:
        return str(error)
    return None


@settings(max_examples=examples(600))
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.integers(0, 2))
def test_a_block_is_good_just_if_the_slow_reader_finds_it_good(seed, overlap, ordered, num_changes):
    rng = np.random.default_rng(seed)
    rows, groups = make_rows(rng, overlap=overlap), make_groups(rng, ordered=ordered)
    block = encode_block(rows, groups, tau=TAU, rounding_kl=5e-3, seed=seed).block
    planes = [bytearray(plane) for plane in planes_of(block)]
    for _ in range(num_changes):
        plane = planes[rng.choice([number for number, plane in enumerate(planes) if plane])]
        at = rng.integers(0, len(plane))
        plane[at] = rng.choice([rng.integers(0, 256), (plane[at] + 1) % 256, plane[at] ^ 1])
    block = block_of(block, [bytes(plane) for plane in planes])
    slow, said = read_slowly(block, groups.table, rows.tail_mass), refusal(block, groups, rows.tail_mass)
    assert (slow is None) == (said is not None), said
    if slow is not None:
        got = decode_block(block, groups, tail_mass=rows.tail_mass, entropy=rows.entropy, log_sum_exp=rows.log_sum_exp)
        for number, row in enumerate(slow):
            start, stop = got.offsets[number : number + 2]
            cut = start + got.num_exact[number]
            assert sorted(got.ids[start:cut]) == sorted(row.exact)
            assert got.ids[cut:stop].tolist() == sorted(row.sampled)
            draws = np.exp(got.logprobs[cut:stop]) / TAU
            np.testing.assert_allclose(draws, [row.sampled[token] for token in sorted(row.sampled)], rtol=1e-6)


def test_the_slow_reader_meets_each_of_its_cases():
    """Of the blocks above without changes: good ones, and ones with an id twice, under both kinds of groups."""
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        overlap, ordered = seed % 2 == 0, seed % 4 < 2
        rows, groups = make_rows(rng, overlap=overlap), make_groups(rng, ordered=ordered)
        block = encode_block(rows, groups, tau=TAU, rounding_kl=5e-3, seed=seed).block
        said = refusal(block, groups, rows.tail_mass)
        assert said in (None, "the block has an id twice in one row")
        assert (said is None) == (read_slowly(block, groups.table, rows.tail_mass) is not None)
        seen.add((said is None, overlap, ordered))
    assert seen == {(good, True, ordered) for good in (True, False) for ordered in (True, False)} | {
        (True, False, True), (True, False, False),
    }  # fmt: skip


@pytest.mark.parametrize("rounding_kl", [0.0, 1e-6, 5e-3])
def test_float_wide_and_byte_levels_are_all_checked_against_the_tails(rounding_kl):
    rng = np.random.default_rng(3)
    rows, groups = make_rows(rng, overlap=False), make_groups(rng, ordered=True)
    block = encode_block(rows, groups, tau=TAU, rounding_kl=rounding_kl).block
    assert refusal(block, groups, rows.tail_mass) is None
    row = int(np.argmax(rows.num_exact > 0))
    moved = rows.tail_mass.copy()
    moved[row] += 0.5 if moved[row] < 0.5 else -0.25
    assert refusal(block, groups, moved) == "the block's exact entries and the tail masses do not sum to 1"


def test_a_block_without_entries_and_groups_of_one_size_is_good():
    bare = SparseRows.empty()
    groups = IdGroups(np.ones(3, np.uint8))  # three ids in a group whose places have four values
    block = encode_block(bare, groups, tau=0, rounding_kl=5e-3).block
    check_block(block, groups, tail_mass=bare.tail_mass, tau=0)
    rows = SparseRows(
        offsets=np.zeros(3, np.int64), ids=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32),
        num_exact=np.zeros(2, np.int32), tail_mass=np.ones(2, np.float32), entropy=np.ones(2, np.float32),
        log_sum_exp=np.zeros((2, 0), np.float32),
    )  # fmt: skip
    check_block(encode_block(rows, groups, tau=0, rounding_kl=5e-3).block, groups, tail_mass=rows.tail_mass, tau=0)


def test_a_place_behind_the_last_id_of_the_last_group_is_refused():
    """Of a group that no other entry of the row touches, which is the only place that is looked at in the row."""
    groups = IdGroups(np.array([1, 2, 3, 3, 3], np.uint8))  # the last group has three ids, its places four values
    rows = SparseRows(
        offsets=np.array([0, 2], np.int64), ids=np.array([0, 4], np.int32),
        logprobs=np.log(np.array([0.75, 0.25], np.float32)), num_exact=np.full(1, 2, np.int32),
        tail_mass=np.zeros(1, np.float32), entropy=np.ones(1, np.float32), log_sum_exp=np.zeros((1, 0), np.float32),
    )  # fmt: skip
    block = encode_block(rows, groups, tau=0, rounding_kl=5e-3).block
    planes = planes_of(block)
    assert planes[2] == b"\x02"
    check_block(block, groups, tail_mass=rows.tail_mass, tau=0)
    for place, good in enumerate((True, True, True, False)):
        changed = block_of(block, [*planes[:2], bytes([place]), *planes[3:]])
        assert (refusal(changed, groups, rows.tail_mass) is None) == good
        assert (read_slowly(changed, groups.table, rows.tail_mass) is not None) == good
