"""Blocks of sparse rows: what comes back, what it costs, and what damage does."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.encoding import row_block as blocks
from storage.encoding.id_groups import IdGroups
from storage.encoding.row_block import EncodedBlock, decode_block, encode_block
from storage.encoding.row_block_check import check_block
from storage.encoding.row_block_header import read_header
from storage.errors import CorruptPartError
from storage.records.sparse_rows import SparseRows, check_sampled_total, check_scalars
from tests.hypothesis_profiles import examples
from tests.storage.synthetic_cache import VOCAB_SIZE, make_logits, select, top_k

TAU = 0.02


def encode(rows: SparseRows, *, tau: float = TAU, rounding_kl: float = 5e-4) -> tuple[EncodedBlock, IdGroups]:
    groups = IdGroups.of_counts(np.bincount(rows.ids, minlength=VOCAB_SIZE))
    return encode_block(rows, groups, tau=tau, rounding_kl=rounding_kl), groups


def decode(block: bytes, groups: IdGroups, rows: SparseRows, draw_set: int = 0) -> SparseRows:
    scalars = {name: getattr(rows, name) for name in ("tail_mass", "entropy", "log_sum_exp", "label_logprob")}
    return decode_block(block, groups, **scalars, draw_set=draw_set)


def make_rows(seed: int, count: int = 40, *, tau: float = TAU) -> SparseRows:
    rng = np.random.default_rng(seed)
    return select(make_logits(rng, count), tau=tau, rng=rng, labels=True)


def divergences(rows: SparseRows, got: SparseRows) -> np.ndarray:
    """KL(exact entries || decoded ones) by row, the slow way: matched by id."""
    costs = []
    for row in range(rows.num_rows):
        cut, end = rows.offsets[row], rows.offsets[row] + rows.num_exact[row]
        decoded = dict(zip(got.ids[cut:end].tolist(), got.logprobs[cut:end].tolist(), strict=True))
        p = np.exp(rows.logprobs[cut:end].astype(np.float64))
        q = np.exp([decoded[token] for token in rows.ids[cut:end].tolist()])
        costs.append((p * np.log(p / q)).sum())
    return np.array(costs)


@pytest.mark.parametrize("seed", range(5))
def test_ids_draws_and_scalars_come_back_exactly_and_heads_sum_to_one_minus_tail(seed):
    rows = make_rows(seed)
    encoded, groups = encode(rows)
    got = decode(encoded.block, groups, rows)
    got.validate(VOCAB_SIZE)
    assert got.offsets.tolist() == rows.offsets.tolist()
    assert got.num_exact.tolist() == rows.num_exact.tolist()
    sampled = ~rows.is_exact()
    assert got.ids[sampled].tolist() == rows.ids[sampled].tolist()
    np.testing.assert_allclose(got.logprobs[sampled], rows.logprobs[sampled], rtol=1e-6)
    for row in range(rows.num_rows):
        cut, end = rows.offsets[row], rows.offsets[row] + rows.num_exact[row]
        assert sorted(got.ids[cut:end]) == sorted(rows.ids[cut:end])
        head = np.exp(got.logprobs[cut:end].astype(np.float64)).sum()
        assert end == cut or head == pytest.approx(1 - float(rows.tail_mass[row]), abs=1e-6)


@pytest.mark.parametrize("bound", [2e-5, 5e-4, 5e-3])
def test_rounding_costs_what_was_allowed_and_says_so(bound):
    rows = make_rows(0, 400)
    encoded, groups = encode(rows, rounding_kl=bound)
    got = divergences(rows, decode(encoded.block, groups, rows))
    np.testing.assert_allclose(encoded.errors, np.maximum(got, 0), atol=2e-6)
    assert got.mean() <= 1.2 * bound
    assert got.mean() >= 0.2 * min(bound, 1e-3)  # a bound that is not used would waste bytes


def exact_probabilities(rows: SparseRows) -> np.ndarray:
    """Probabilities of the exact entries, by row and by id."""
    exact = rows.is_exact()
    order = np.argsort(rows.row_of_entry()[exact] * VOCAB_SIZE + rows.ids[exact])
    return np.exp(rows.logprobs[exact][order].astype(np.float64))


def test_the_mean_of_decoded_probabilities_is_the_probability():
    rows = make_rows(0, 30)
    groups = IdGroups.of_counts(np.bincount(rows.ids, minlength=VOCAB_SIZE))
    decoded, block = [], b""
    for seed in range(400):
        block = encode_block(rows, groups, tau=TAU, rounding_kl=5e-3, seed=seed).block
        decoded.append(exact_probabilities(decode(block, groups, rows)))
    mean, error = np.mean(decoded, axis=0), np.std(decoded, axis=0) / np.sqrt(len(decoded))
    step = read_header(memoryview(block)).step
    given = exact_probabilities(rows)
    head = np.repeat(1 - rows.tail_mass.astype(np.float64), rows.num_exact)
    several = np.repeat(rows.num_exact, rows.num_exact) > 1
    assert error[several].min() > 1e-5  # rounding is random, or this shows nothing
    # What scaling the head leaves is within step^2 / (1 - tail), as FORMAT.md says; the rest is chance.
    assert (np.abs(mean - given) <= 5 * error + given * step**2 / head + 1e-6).all()
    assert (np.abs(mean - given) / np.maximum(error, 1e-9))[several].mean() < 1.5  # of chance alone 0.8


@pytest.mark.parametrize("rounding_kl", [0.0, 5e-5, 5e-3, 0.1])
def test_the_first_entry_of_a_decoded_row_is_the_first_choice_and_larger_than_others(rounding_kl):
    rows = make_rows(0, 400)
    close = rows.logprobs.copy()  # also where the second entry is almost as probable
    at = rows.offsets[:-1][(rows.num_exact > 1) & (np.arange(400) % 2 == 0)]
    middle = np.log((np.exp(close[at]) + np.exp(close[at + 1])) / 2)
    close[at], close[at + 1] = middle + 1e-3, middle - 1e-3
    rows = replace(rows, logprobs=close.astype(np.float32))
    for seed in range(5):
        groups = IdGroups.of_counts(np.bincount(rows.ids, minlength=VOCAB_SIZE))
        block = encode_block(rows, groups, tau=TAU, rounding_kl=rounding_kl, seed=seed).block
        got = decode(block, groups, rows)
        got.validate(VOCAB_SIZE)
        filled, several = rows.num_exact > 0, got.offsets[:-1][rows.num_exact > 1]
        assert got.ids[got.offsets[:-1][filled]].tolist() == rows.ids[rows.offsets[:-1][filled]].tolist()
        probs = np.exp(got.logprobs)
        assert (probs[several] > probs[several + 1]).all()


def test_a_mark_on_an_entry_that_is_not_the_most_probable_is_refused():
    rows = make_rows(3, 12)
    encoded, groups = encode(rows)
    at = read_header(memoryview(encoded.block)).planes["first_choices"]
    marks = np.frombuffer(zstandard.ZstdDecompressor().decompress(encoded.block[at]), np.uint8) + np.uint8(1)
    plane = zstandard.ZstdCompressor().compress(marks.tobytes())
    block = encoded.block[:44] + struct.pack("<I", len(plane)) + encoded.block[48 : at.start] + plane
    with pytest.raises(CorruptPartError, match="first choice"):
        decode(block + encoded.block[at.stop :], groups, rows)


def test_without_rounding_the_rows_come_back_to_float32():
    rows = make_rows(1)
    encoded, groups = encode(rows, rounding_kl=0)
    got = decode(encoded.block, groups, rows)
    assert got.ids.tolist() == rows.ids.tolist()
    np.testing.assert_allclose(got.logprobs, rows.logprobs, atol=2e-6)
    assert encoded.errors.max() == 0


def test_top_k_rows_with_the_whole_vocabulary_come_back():
    rows = top_k(make_logits(np.random.default_rng(2), 20), VOCAB_SIZE, labels=True)
    rows = replace(rows, tail_mass=np.zeros(20, np.float32))
    encoded, groups = encode(rows, tau=0, rounding_kl=0)
    np.testing.assert_allclose(decode(encoded.block, groups, rows).logprobs, rows.logprobs, atol=1e-5)


@pytest.mark.parametrize("gap", [30.0, 90.0, 120.0, 1000.0])
def test_entries_too_improbable_for_float32_are_kept(gap):
    logits = np.full((2, VOCAB_SIZE), -gap)
    logits[0, 5], logits[1, 9] = 0, 0
    rows = top_k(logits, 4, labels=True)
    rows = replace(rows, tail_mass=np.zeros(2, np.float32))
    encoded, groups = encode(rows, tau=0)
    assert np.isfinite(encoded.errors).all()
    got = decode(encoded.block, groups, rows)
    got.validate(VOCAB_SIZE)
    assert got.ids[[0, 4]].tolist() == [5, 9]


def test_an_id_that_is_both_exact_and_sampled_is_refused():
    rows = SparseRows(
        offsets=np.array([0, 2], np.int64), ids=np.array([3, 3], np.int32),
        logprobs=np.log(np.array([0.5, 0.5], np.float32)), num_exact=np.ones(1, np.int32),
        tail_mass=np.full(1, 0.5, np.float32), entropy=np.ones(1, np.float32),
        log_sum_exp=np.zeros((1, 0), np.float32),
    )  # fmt: skip
    encoded, groups = encode(rows, tau=0.5)  # which does not look: its caller has validated the rows
    with pytest.raises(CorruptPartError, match="an id twice in one row"):
        decode(encoded.block, groups, rows)


def test_no_rows_and_rows_without_entries_are_blocks_too():
    empty = SparseRows.empty(with_labels=True)
    encoded, groups = encode(empty)
    assert decode(encoded.block, groups, empty).num_rows == 0
    bare = SparseRows(
        offsets=np.zeros(3, np.int64), ids=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32),
        num_exact=np.zeros(2, np.int32), tail_mass=np.ones(2, np.float32), entropy=np.ones(2, np.float32),
        log_sum_exp=np.zeros((2, 0), np.float32),
    )  # fmt: skip
    encoded, groups = encode(bare, tau=0)
    assert decode(encoded.block, groups, bare).num_entries == 0


def test_an_entry_drawn_many_times_keeps_its_count():
    rows = SparseRows(
        offsets=np.array([0, 2], np.int64), ids=np.array([3, 9], np.int32),
        logprobs=np.log(np.array([300, 700], np.float32) * 1e-3).astype(np.float32),
        num_exact=np.zeros(1, np.int32), tail_mass=np.ones(1, np.float32), entropy=np.ones(1, np.float32),
        log_sum_exp=np.zeros((1, 0), np.float32),
    )  # fmt: skip
    encoded, groups = encode(rows, tau=1e-3)
    np.testing.assert_allclose(np.exp(decode(encoded.block, groups, rows).logprobs), [0.3, 0.7], rtol=1e-6)


def test_an_id_costs_much_less_than_its_bits():
    rng = np.random.default_rng(3)
    popularity = rng.normal(size=VOCAB_SIZE) * 3
    rows = select(make_logits(rng, 3000) * 0.2 + popularity, tau=TAU, rng=rng, labels=False)
    encoded, _ = encode(rows)
    bits = 8 * len(encoded.block) / rows.num_entries
    assert bits < 0.8 * (np.log2(VOCAB_SIZE) + 8)  # as raw ids with byte values


def test_sampled_weights_must_be_whole_draws_and_add_up_to_the_tail():
    rng = np.random.default_rng(1)
    rows = select(make_logits(rng, 3) * 0.1, tau=TAU, rng=rng, labels=False)
    with pytest.raises(ValueError, match="whole multiple"):
        encode(rows, tau=TAU * 1.1)
    twice = replace(rows, logprobs=rows.logprobs + np.float32(np.log(2)))
    with pytest.raises(ValueError, match=r"row \d: sampled weights differ"):
        encode(twice)
    with pytest.raises(ValueError, match="tau is 0"):
        encode(rows, tau=0)
    exact_only = top_k(make_logits(rng, 1) * 0.1, 4, labels=False)
    with pytest.raises(ValueError, match="row 0: sampled weights differ"):
        encode(exact_only)


FIELDS = ("version", "length_bytes", "draw_bytes", "num_sets", "num_rows", "exact", "tau", "step", "lowest")
FIXED = struct.Struct("<BBBBIIdff")  # what comes before the planes' sizes: 28 bytes, then 20 of the exact entries'


def respelled(block: bytes, **changes: Any) -> bytes:
    fields = dict(zip(FIELDS, FIXED.unpack_from(block), strict=True)) | changes
    sampled = fields.pop("sampled", struct.unpack_from("<I", block, 48)[0])
    return FIXED.pack(*fields.values()) + block[28:48] + struct.pack("<I", sampled) + block[52:]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 5}, "version 5"),
        ({"version": 3}, "version 3"),
        ({"length_bytes": 3}, "widths"),
        ({"num_sets": 0}, "0 sets of draws"),
        ({"num_sets": 65}, "65 sets of draws"),
        ({"num_sets": 2}, "its header needs"),
        ({"num_rows": 41}, "scalar columns"),
        ({"num_rows": 2**20}, "claims"),
        ({"exact": 2**31}, "claims"),
        ({"sampled": 2**31}, "claims"),
        ({"tau": 0.0}, "sampled entries and tau"),
        ({"tau": float("nan")}, "sampled entries and tau"),
        ({"step": 2.0}, "the step"),
        ({"step": float("nan")}, "the step"),
        ({"lowest": -1.0}, "the step"),
        ({"lowest": 0.5}, "the step"),
    ],
)
def test_a_wrong_header_is_refused(changes, problem):
    rows = make_rows(4)
    encoded, groups = encode(rows)
    with pytest.raises(CorruptPartError, match=problem):
        decode(respelled(encoded.block, **changes), groups, rows)


def test_a_plane_that_would_grow_in_memory_is_refused_before_it_does():
    rows = make_rows(5)
    encoded, groups = encode(rows)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    at = read_header(memoryview(encoded.block)).planes["num_exact"]
    block = encoded.block[:28] + struct.pack("<I", len(bomb)) + encoded.block[32 : at.start] + bomb
    block += encoded.block[at.stop :]
    with pytest.raises(CorruptPartError, match="plane num_exact does not hold"):
        decode(block, groups, rows)


def test_other_groups_or_scalars_are_noticed():
    rows = make_rows(6)
    encoded, groups = encode(rows)
    with pytest.raises(CorruptPartError):
        decode(encoded.block, IdGroups.of_counts(np.r_[1, np.zeros(VOCAB_SIZE - 1, int)]), rows)
    with pytest.raises(CorruptPartError, match="do not sum to 1"):
        decode(encoded.block, groups, replace(rows, tail_mass=np.zeros_like(rows.tail_mass)))
    with pytest.raises(CorruptPartError, match=r"outside 0\.\.1"):
        decode(encoded.block, groups, replace(rows, tail_mass=rows.tail_mass - 2))


@settings(max_examples=examples(300))
@given(st.data())
def test_any_damage_to_a_block_is_an_error_or_valid_rows(data):
    rows = make_sets(7, data.draw(st.integers(1, 3)), 12)
    groups = IdGroups.of_counts(np.ones(VOCAB_SIZE, int))
    block = bytearray(encode_block(rows, groups, tau=TAU, rounding_kl=5e-4).block)
    for _ in range(data.draw(st.integers(1, 4))):
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del block[data.draw(st.integers(0, len(block))) :]
    try:
        got = decode(bytes(block), groups, rows, data.draw(st.integers(0, 2)))
    except CorruptPartError:
        return
    assert got.num_rows == rows.num_rows
    assert (got.ids >= 0).all()
    assert (got.ids < VOCAB_SIZE).all()


def damaged_planes(block: bytes, data: st.DataObject) -> bytes:
    """A block of which some bytes of a plane are changed below the compression, so that every frame is good."""
    spans = read_header(memoryview(block)).planes.values()
    planes = [bytearray(zstandard.ZstdDecompressor().decompress(block[at]) if block[at] else b"") for at in spans]
    for _ in range(data.draw(st.integers(1, 3))):
        plane = data.draw(st.sampled_from([plane for plane in planes if plane]))
        plane[data.draw(st.integers(0, len(plane) - 1))] = data.draw(st.integers(0, 255))
    packed = [zstandard.ZstdCompressor().compress(bytes(plane)) if plane else b"" for plane in planes]
    sizes = [len(plane) for plane in packed]
    exact, drawn = struct.pack("<5I", *sizes[:5]), struct.pack("<4I", *sizes[5:])
    return b"".join([block[:28], exact, block[48:52], drawn, *packed])


@settings(max_examples=examples(600))
@given(st.data(), st.sampled_from([0, 5e-4]), st.booleans(), st.booleans())
def test_a_block_is_found_good_without_its_rows_just_if_its_rows_are_good(data, rounding_kl, repeated, changes_tail):
    tau = 0.05 if repeated else TAU
    rows = sampled_rows(12, tau) if repeated else make_rows(8, 12)
    encoded, groups = encode(rows, tau=tau, rounding_kl=rounding_kl)
    if changes_tail:
        tails = rows.tail_mass.copy()
        tails[data.draw(st.integers(0, 11))] = data.draw(st.floats(-0.125, 1.125, width=32))
        rows = replace(rows, tail_mass=tails)
    block = damaged_planes(encoded.block, data)
    refusals = []
    for look in (look_at_rows, look_at_block):
        try:
            look(block, groups, rows, tau)
            refusals.append(None)
        except (CorruptPartError, ValueError) as error:
            refusals.append(error)
    assert (refusals[0] is None) == (refusals[1] is None), refusals


def look_at_rows(block: bytes, groups: IdGroups, rows: SparseRows, tau: float) -> None:
    got = decode(block, groups, rows)
    got.validate(VOCAB_SIZE)
    check_sampled_total(got, tau)


def look_at_block(block: bytes, groups: IdGroups, rows: SparseRows, tau: float) -> None:
    check_scalars(
        tail_mass=rows.tail_mass, entropy=rows.entropy, log_sum_exp=rows.log_sum_exp, label_logprob=rows.label_logprob
    )
    check_block(block, groups, tail_mass=rows.tail_mass, tau=tau)


def sampled_rows(count: int, tau: float) -> SparseRows:
    """Rows of draws alone, some entries drawn more than once."""
    ids, logprobs, sizes = [], [], []
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens, draws = np.unique(rng.integers(0, 30, round(1 / tau)), return_counts=True)
        ids.append(tokens)
        logprobs.append(np.log(draws * tau))
        sizes.append(len(tokens))
    return SparseRows(
        offsets=np.cumsum([0, *sizes]).astype(np.int64), ids=np.concatenate(ids).astype(np.int32),
        logprobs=np.concatenate(logprobs).astype(np.float32), num_exact=np.zeros(count, np.int32),
        tail_mass=np.ones(count, np.float32), entropy=np.ones(count, np.float32),
        log_sum_exp=np.zeros((count, 0), np.float32), label_logprob=-np.ones(count, np.float32),
    )  # fmt: skip


@settings(max_examples=examples(300))
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_no_block(content):
    rows = SparseRows.empty(with_labels=True)
    groups = IdGroups.of_counts(np.ones(VOCAB_SIZE, int))
    with pytest.raises(CorruptPartError):
        decode(struct.pack("<BBBB", 4, 1, 1, 1) + content, groups, rows)


def written_example(name: str) -> bytes:
    text = (Path(blocks.__file__).parents[1] / "FORMAT.md").read_text(encoding="utf-8")
    (written,) = re.findall(rf"```hex {name}\n(.*?)```", text, re.DOTALL)
    return bytes.fromhex(re.sub(r"#.*", "", written))


@pytest.mark.parametrize(("draw_set", "drawn"), [(0, 12), (1, 40), (2, 12)])
def test_the_worked_example_of_the_specification_is_read(draw_set, drawn):
    groups = IdGroups.of_counts(np.bincount([3, 7, 12, 40, 900], minlength=1000))
    zero = np.zeros(2, np.float32)
    got = decode_block(
        written_example("block"),
        groups,
        tail_mass=np.array([0.25, 0], np.float32),
        entropy=zero,
        log_sum_exp=np.zeros((2, 0), np.float32),
        draw_set=draw_set,
    )
    assert got.offsets.tolist() == [0, 3, 4]
    assert got.ids.tolist() == [7, 3, drawn, 900]
    head = np.array([23, 16]) ** 2 / (23**2 + 16**2) * 0.75
    np.testing.assert_allclose(np.exp(got.logprobs), [*head, 0.25, 1], rtol=1e-6)


def test_the_worked_example_is_what_is_written():
    zero = np.zeros(2, np.float32)
    sets = [
        SparseRows(
            offsets=np.array([0, 3, 4], np.int64), ids=np.array([7, 3, drawn, 900], np.int32),
            logprobs=np.log(np.array([0.5, 0.25, 0.25, 1], np.float32)), num_exact=np.array([2, 1], np.int32),
            tail_mass=np.array([0.25, 0], np.float32), entropy=zero, log_sum_exp=np.zeros((2, 0), np.float32),
        )
        for drawn in (12, 40)
    ]  # fmt: skip
    groups = IdGroups.of_counts(np.bincount([3, 7, 12, 40, 900], minlength=1000))
    rows = replace(sets[0], other_sets=(sets[1],))
    got = encode_block(rows, groups, tau=0.25, rounding_kl=1.5 / 32**2 / 3).block
    assert got[:88] == written_example("block")[:88]
    for draw_set in (0, 1):
        assert decode(got, groups, rows, draw_set).equals(decode(written_example("block"), groups, rows, draw_set))


def make_sets(seed: int, num_sets: int, count: int = 30) -> SparseRows:
    """Rows with several sets of draws."""
    logits = make_logits(np.random.default_rng(seed), count)
    first, *others = [
        select(logits, tau=TAU, rng=np.random.default_rng([seed, number]), labels=True) for number in range(num_sets)
    ]
    return replace(first, other_sets=tuple(others))


@pytest.mark.parametrize("num_sets", [2, 5])
def test_each_set_of_draws_comes_back_beside_the_same_exact_entries(num_sets):
    rows = make_sets(8, num_sets)
    stored = np.concatenate([each.ids for each in (rows, *rows.other_sets)])
    groups = IdGroups.of_counts(np.bincount(stored, minlength=VOCAB_SIZE))
    block = encode_block(rows, groups, tau=TAU, rounding_kl=0).block
    for number, each in enumerate((rows, *rows.other_sets)):
        got = decode(block, groups, rows, number)
        assert got.ids.tolist() == each.ids.tolist()
        np.testing.assert_allclose(got.logprobs, each.logprobs, atol=2e-6)
        assert got.equals(decode(block, groups, rows, number + num_sets))
    assert len({tuple(each.ids) for each in (rows, *rows.other_sets)}) == num_sets  # or there is nothing to tell apart


def test_a_further_set_costs_its_sampled_entries_alone():
    one, two, three = (make_sets(9, count, 2000) for count in (1, 2, 3))
    groups = IdGroups.of_counts(np.ones(VOCAB_SIZE, int))
    sizes = [len(encode_block(rows, groups, tau=TAU, rounding_kl=5e-4).block) for rows in (one, two, three)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.02)
    sampled = one.num_entries - one.num_exact.sum()
    assert 8 * (sizes[1] - sizes[0]) / sampled < np.log2(VOCAB_SIZE) + 1


def test_sets_of_other_rows_and_too_many_sets_are_refused():
    rows, other = make_sets(10, 2), make_rows(11, 30)
    with pytest.raises(ValueError, match="set 1 of draws is of other rows"):
        replace(rows, other_sets=(other,)).validate(VOCAB_SIZE)
    with pytest.raises(ValueError, match="65 sets"):
        encode(replace(rows, other_sets=rows.other_sets * 64))
