import contextlib
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.config import RelationSection
from storage.encoding.relation_matrix import (
    assign_grid_blocks,
    check_encoding,
    check_payload,
    compute_stored_norm,
    count_grid_blocks,
    decode_relation,
    encode_relation,
    read_cosine_error,
)
from storage.errors import CorruptPartError
from storage.records.records import PooledRelation, RelationFactor, RelationMatrix
from tests.hypothesis_profiles import examples
from tests.storage.synthetic_cache import make_relation

FORMAT = Path(__file__).parents[3] / "storage" / "FORMAT.md"
SECTIONS = [
    RelationSection(),
    RelationSection(encoding="triangle_int8"),
    RelationSection(encoding="low_rank"),
    RelationSection(encoding="low_rank", max_cosine_error=0.05, factor_dtype="int8"),
    RelationSection(encoding="pooled"),
    RelationSection(encoding="pooled", pool=3),
]
BOUNDS = (1e-6, 2e-4, 1e-3, 0.05, 2.0, 2.0)  # of the cosine error


def make_low_rank_matrix(rng, n, rank=3, noise=0.05):
    """G / ||G|| of rows near a subspace, row norms differing by a factor of ten or so."""
    rows = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, 40)) + noise * rng.normal(size=(n, 40))
    rows *= rng.lognormal(0, 0.5, size=(n, 1))
    gram = rows @ rows.T
    norm = float(np.linalg.norm(gram))
    return RelationMatrix((gram / norm).astype(np.float32), norm)


def decode(payload, matrix, section=None):
    norm = matrix.norm if section is None else compute_stored_norm(matrix, section)
    return decode_relation(payload, norm=norm, num_visual_tokens=len(matrix.values))


def compute_cosine_distance(a, b):
    """The slow reference, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 1 - (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


def expand_to_matrix(got):
    """(n, n) what a decoded matrix says of the original's entries."""
    if not isinstance(got, PooledRelation):
        return got.values
    block = assign_grid_blocks(got.num_visual_tokens, got.pool)
    return got.values[block][:, block]


@pytest.mark.parametrize(("section", "bound"), list(zip(SECTIONS, BOUNDS, strict=True)))
@given(side=st.integers(1, 7), seed=st.integers(0, 10**6))
@settings(max_examples=examples(60))
def test_matrices_come_back_with_the_stated_error(section, bound, side, seed):
    matrix = make_low_rank_matrix(np.random.default_rng(seed), side * side)
    payload = encode_relation(matrix, section)
    got = decode(payload, matrix, section)
    check_encoding(got, section)
    assert got.num_visual_tokens == side * side
    np.testing.assert_allclose(got.values, got.values.T, atol=1e-7)
    assert np.linalg.norm(got.values) == pytest.approx(1, abs=1e-5)
    assert got.norm == pytest.approx(compute_stored_norm(matrix, section))
    stated = read_cosine_error(payload)
    assert stated is not None
    assert stated == pytest.approx(compute_cosine_distance(matrix.values, expand_to_matrix(got)), rel=0.02, abs=2e-7)
    assert stated <= bound


@pytest.mark.parametrize("section", SECTIONS)
def test_an_all_zero_matrix_comes_back(section):
    zero = RelationMatrix(np.zeros((9, 9), np.float32), 0.0)
    payload = encode_relation(zero, section)
    got = decode(payload, zero, section)
    assert got.norm == 0
    assert read_cosine_error(payload) == 0
    assert not got.values.any()


def test_payload_sizes_at_576_visual_tokens():
    matrix = make_low_rank_matrix(np.random.default_rng(0), 576, rank=8)
    sizes = [len(encode_relation(matrix, section)) - 16 for section in SECTIONS]
    assert sizes[:2] == [576 * 577, 4 * 576 + 576 * 577 // 2]
    got = decode(encode_relation(matrix, SECTIONS[2]), matrix)
    assert isinstance(got, RelationFactor)
    rank = got.factor.shape[1]
    assert sizes[2] == 2 * 576 * rank
    assert rank <= 8
    assert sizes[4:] == [144 * 145, 64 * 65]


@pytest.mark.parametrize("factor_dtype", ["float16", "int8"])
@pytest.mark.parametrize("bound", [1e-1, 1e-2, 1e-3])
def test_the_rank_is_the_least_that_keeps_the_error(factor_dtype, bound):
    matrix = make_low_rank_matrix(np.random.default_rng(3), 100, rank=20, noise=0.3)
    section = RelationSection.model_validate(
        {"encoding": "low_rank", "max_cosine_error": bound, "factor_dtype": factor_dtype}
    )
    got = decode(encode_relation(matrix, section), matrix)
    assert isinstance(got, RelationFactor)
    assert compute_cosine_distance(matrix.values, got.values) <= bound
    values, vectors = np.linalg.eigh(matrix.values.astype(np.float64))
    rank = got.factor.shape[1]
    smaller = vectors[:, -(rank - 1) :] * values[-(rank - 1) :] @ vectors[:, -(rank - 1) :].T
    best_below = compute_cosine_distance(matrix.values, smaller) if rank > 1 else 1.0
    assert best_below > bound * (0.9 if factor_dtype == "int8" else 1)  # int8 may need a rank more


def test_an_int8_factor_gives_way_to_a_smaller_float16_one():
    matrix = make_low_rank_matrix(np.random.default_rng(3), 100, rank=30, noise=0.1)
    sections = [
        RelationSection(encoding="low_rank", max_cosine_error=error, factor_dtype="int8") for error in (1e-2, 1e-6)
    ]
    kinds = [encode_relation(matrix, section)[1] for section in sections]
    assert kinds == [3, 2]
    loose, tight = (decode(encode_relation(matrix, section), matrix) for section in sections)
    assert isinstance(tight, RelationFactor)
    assert isinstance(loose, RelationFactor)
    assert compute_cosine_distance(matrix.values, tight.values) <= 1e-6


def test_a_matrix_of_full_rank_is_kept_as_a_triangle():
    matrix = RelationMatrix(np.eye(30, dtype=np.float32) / np.float32(np.sqrt(30)), 2.0)
    section = RelationSection(encoding="low_rank", max_cosine_error=1e-4)
    payload = encode_relation(matrix, section)
    got = decode(payload, matrix)
    assert isinstance(got, RelationMatrix)
    check_encoding(got, section)
    assert len(payload) == 16 + 30 * 31
    assert (read_cosine_error(payload) or 0) < 1e-6


def test_int8_scales_follow_the_diagonal_so_that_outlier_rows_cost_little():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 40))
    rows[:3] *= 100
    gram = rows @ rows.T
    matrix = RelationMatrix((gram / np.linalg.norm(gram)).astype(np.float32), float(np.linalg.norm(gram)))
    got = decode(encode_relation(matrix, SECTIONS[1]), matrix).values
    quiet = matrix.values[3:, 3:]
    one_scale = np.rint(quiet / matrix.values.max() * 127)
    assert not one_scale.any()  # a scale for the whole matrix would lose these rows altogether
    assert compute_cosine_distance(quiet, got[3:, 3:]) < 1e-3


def test_pooling_is_the_gram_matrix_of_averaged_rows():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(25, 12))
    gram = rows @ rows.T
    matrix = RelationMatrix((gram / np.linalg.norm(gram)).astype(np.float32), float(np.linalg.norm(gram)))
    got = decode(encode_relation(matrix, SECTIONS[4]), matrix, SECTIONS[4])
    assert isinstance(got, PooledRelation)
    grid = rows.reshape(5, 5, 12)
    averaged = [grid[r : r + 2, c : c + 2].reshape(-1, 12).mean(0) for r in (0, 2, 4) for c in (0, 2, 4)]
    pooled = np.array(averaged) @ np.array(averaged).T
    assert got.norm == pytest.approx(np.linalg.norm(pooled), rel=1e-5)
    np.testing.assert_allclose(got.values, pooled / np.linalg.norm(pooled), atol=2e-4)


def test_blocks_lie_row_by_row_and_the_last_are_smaller():
    assert assign_grid_blocks(9, 2).reshape(3, 3).tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3]]
    assert count_grid_blocks(9, 2) == 4
    for refused in (0, 2, 575):
        with pytest.raises(ValueError, match="no square grid"):
            count_grid_blocks(refused, 2)
        with pytest.raises(ValueError, match="no square grid"):
            assign_grid_blocks(refused, 2)


def test_pooled_rows_that_cancel_out_leave_nothing_and_say_so():
    rows = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    gram = rows @ rows.T
    matrix = RelationMatrix((gram / np.linalg.norm(gram)).astype(np.float32), float(np.linalg.norm(gram)))
    payload = encode_relation(matrix, SECTIONS[4])
    got = decode(payload, matrix, SECTIONS[4])
    assert (got.norm, got.values.tolist(), read_cosine_error(payload)) == (0.0, [[0.0]], 1.0)


@pytest.mark.parametrize(
    ("values", "norm", "message"),
    [
        (np.ones((2, 3), np.float32), 1.0, "square"),
        (np.ones((0, 0), np.float32), 1.0, "square"),
        (np.eye(2), 1.0, "float32"),
        (np.array([[1, np.nan], [np.nan, 0]], np.float32), 1.0, "finite and symmetric"),
        (np.array([[0.8, 0.6], [0.0, 0.0]], np.float32), 1.0, "finite and symmetric"),
        (np.eye(2, dtype=np.float32), 1.0, "expected 1"),
        (np.eye(1, dtype=np.float32), -1.0, "norm of a relation matrix"),
        (np.eye(1, dtype=np.float32), np.inf, "norm of a relation matrix"),
        (np.eye(1, dtype=np.float32), 1e39, "norm of a relation matrix"),
    ],
)
@pytest.mark.parametrize("section", SECTIONS)
def test_invalid_matrices_are_refused(section, values, norm, message):
    with pytest.raises(ValueError, match=message):
        encode_relation(RelationMatrix(values, norm), section)


def test_what_an_encoding_cannot_hold_is_refused():
    matrix = RelationMatrix(np.array([[0, 1], [1, 0]], np.float32) / np.float32(np.sqrt(2)), 1.0)
    with pytest.raises(ValueError, match="not a Gram matrix"):
        encode_relation(matrix, SECTIONS[1])
    with pytest.raises(ValueError, match="2 visual tokens are no square grid"):
        encode_relation(matrix, SECTIONS[4])


def test_a_payload_of_another_encoding_is_refused():
    matrix = make_low_rank_matrix(np.random.default_rng(0), 36)
    for payload_of, read_as in ((0, 4), (1, 4), (2, 0), (4, 0), (4, 5), (5, 4)):
        got = decode(encode_relation(matrix, SECTIONS[payload_of]), matrix, SECTIONS[payload_of])
        with pytest.raises(CorruptPartError, match="the cache's encoding is"):
            check_encoding(got, SECTIONS[read_as])


def assert_valid_or_refused(payload, n, norm):
    try:
        got = decode_relation(payload, norm=norm, num_visual_tokens=n)
    except CorruptPartError:
        return False
    assert got.num_visual_tokens == n
    assert np.isfinite(got.values).all()
    np.testing.assert_allclose(got.values, got.values.T, atol=1e-6)
    assert np.linalg.norm(got.values) == pytest.approx(float(norm > 0), abs=1e-4)
    error = read_cosine_error(payload)
    assert error is None or 0 <= error <= 2
    return True


@given(st.binary(max_size=200), st.integers(0, 5), st.sampled_from([0.0, 1.0, float("nan"), -1.0]))
@settings(max_examples=examples(500))
def test_arbitrary_bytes_never_do_worse_than_being_refused(payload, n, norm):
    assert_valid_or_refused(payload, n, norm)


@given(
    st.integers(0, 5), st.integers(0, 3), st.integers(1, 5), st.integers(0, 3),
    st.floats(0, 1, width=32), st.binary(max_size=60),
)  # fmt: skip
@settings(max_examples=examples(500))
def test_arbitrary_content_under_a_plausible_header_is_valid_or_refused(kind, pool, n, rank, error, content):
    header = struct.pack("<BBBxIIf", 2, kind, pool, n, rank, error)
    m = count_grid_blocks(n, pool) if kind == 4 and pool >= 2 and n in (1, 4) else n
    needed = {0: m * (m + 1), 1: 4 * n + n * (n + 1) // 2, 2: 2 * n * rank, 3: rank * (4 + n), 4: m * (m + 1)}
    size = needed.get(kind, 0)
    assert_valid_or_refused(header + content.ljust(size, b"\x01")[:size], n, 1.0)


@pytest.mark.parametrize("section", SECTIONS)
@given(data=st.data())
@settings(max_examples=examples(150))
def test_damaged_payloads_never_do_worse_than_being_refused(section, data):
    matrix = make_low_rank_matrix(np.random.default_rng(5), 9)
    payload = bytearray(encode_relation(matrix, section))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    payload = bytes(payload[: data.draw(st.integers(len(payload) - 2, len(payload)))])
    is_good = assert_valid_or_refused(payload, 9, matrix.norm)
    try:
        if is_good:
            check_encoding(decode_relation(payload, norm=matrix.norm, num_visual_tokens=9), section)
    except CorruptPartError:
        is_good = False
    with contextlib.nullcontext() if is_good else pytest.raises(CorruptPartError):
        check_payload(payload, norm=matrix.norm, num_visual_tokens=9, section=section)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x01\0\0\0\xff\xff\xff\xff",
        b"\x02\0\0\0\xff\xff\0\0" + b"\0" * 8,
        b"\x02\x02\0\0\xff\xff\0\0\x01\0\0\0\0\0\0\0" + b"\0" * 2 * 65535,  # whole, but of another image
        b"\x02\x03\0\0\xff\xff\0\0\xff\xff\0\0\0\0\0\0",
        b"\x02\x04\x02\0\xff\xff\0\0" + b"\0" * 8,
    ],
)
def test_a_header_that_claims_much_allocates_next_to_nothing(payload):
    tracemalloc.start()
    with pytest.raises(CorruptPartError):
        decode_relation(payload + b"\0" * 100, norm=1.0, num_visual_tokens=4)
    with pytest.raises(CorruptPartError):
        decode_relation(payload, norm=1.0, num_visual_tokens=4)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_worked_examples_of_the_specification_are_what_is_written_and_read():
    blocks = re.findall(r"```hex (\w+)\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL)
    written = {name: bytes.fromhex(re.sub(r"#.*", "", block)) for name, block in blocks}
    matrix = RelationMatrix(np.array([[0.75, 0.25], [0.25, 0.5]], np.float32) / np.float32(0.96824584), 8.0)
    assert encode_relation(matrix, SECTIONS[0]) == written["relation"]
    assert encode_relation(matrix, SECTIONS[1]) == written["relation_int8"]
    np.testing.assert_allclose(decode(written["relation"], matrix).values, matrix.values, atol=5e-4)
    np.testing.assert_allclose(decode(written["relation_int8"], matrix).values, matrix.values, atol=5e-3)
    line = RelationMatrix(np.full((4, 4), 0.25, np.float32), 4.0)
    assert encode_relation(line, SECTIONS[2]) == written["relation_factor"]
    assert encode_relation(line, SECTIONS[4]) == written["relation_pooled"]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_cosine_error": 1e-3},
        {"encoding": "triangle_int8", "pool": 2},
        {"encoding": "low_rank", "pool": 2},
        {"encoding": "pooled", "factor_dtype": "int8"},
        {"encoding": "low_rank", "max_cosine_error": 0},
        {"encoding": "pooled", "pool": 1},
        {"encoding": "triangle"},
        {"encoding": ["pooled"]},
    ],
)
def test_unknown_and_useless_settings_are_refused(fields):
    with pytest.raises(ValidationError):
        RelationSection(**fields)


def test_settings_of_an_encoding_have_defaults_and_travel_through_the_identity():
    assert RelationSection(encoding="low_rank").max_cosine_error == 1e-3
    assert RelationSection(encoding="pooled").pool == 2
    for section in SECTIONS:
        assert RelationSection.model_validate(section.model_dump(mode="json", exclude_none=True)) == section
        assert RelationSection.model_validate(section.model_dump(mode="json")) == section


def test_random_gram_matrices_keep_float16s_precision():
    matrix = make_relation(np.random.default_rng(0), 40)
    got = decode(encode_relation(matrix, SECTIONS[0]), matrix)
    np.testing.assert_array_equal(got.values, got.values.T)
    np.testing.assert_allclose(got.values, matrix.values, rtol=2e-3, atol=1e-7)
