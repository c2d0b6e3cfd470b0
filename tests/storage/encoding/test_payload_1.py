import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage.encoding.payload_1 import decode_rows
from storage.errors import CorruptPartError
from storage.records.sparse_rows import SparseRows, check_sampled_total
from tests.hypothesis_profiles import examples
from tests.storage.payload_1 import encode_rows
from tests.storage.synthetic_cache import TAU, VOCAB_SIZE, make_logits, select, top_k

VOCAB_SIZES = st.sampled_from([2, 3, 255, 256, 1000, 65536, 65537])
FORMAT = Path(__file__).parents[3] / "storage" / "FORMAT.md"


def scalars(rows):
    return {
        name: getattr(rows, name)
        for name in ("tail_mass", "entropy", "label_logprob")
        if getattr(rows, name) is not None
    }


def decode(payload, rows, vocab_size=VOCAB_SIZE):
    return decode_rows(payload, vocab_size=vocab_size, **scalars(rows))


def assert_same_but_for_rounding(got: SparseRows, rows: SparseRows):
    for name in ("offsets", "ids", "num_exact", "tail_mass", "entropy"):
        np.testing.assert_array_equal(getattr(got, name), getattr(rows, name))
    exact = rows.is_exact()
    # float16 keeps 11 bits of each logprob; the rescaled head moves by no more than that once again
    np.testing.assert_allclose(got.logprobs[exact], rows.logprobs[exact], rtol=2**-10, atol=2e-2)
    np.testing.assert_allclose(got.logprobs[~exact], rows.logprobs[~exact], rtol=0, atol=1e-5)


def head_sums(rows):
    exact = rows.is_exact()
    p = np.exp(rows.logprobs[exact].astype(np.float64))
    return np.bincount(rows.row_of_entry()[exact], p, rows.num_rows)


@given(VOCAB_SIZES, st.integers(0, 6), st.integers(0, 10**6), st.floats(1e-3, 0.9), st.booleans())
def test_threshold_rows_come_back(vocab_size, num_rows, seed, tau, labels):
    rng = np.random.default_rng(seed)
    rows = select(make_logits(rng, num_rows, vocab_size), tau=tau, rng=rng, labels=labels)
    payload = encode_rows(rows, vocab_size=vocab_size, tau=tau)
    got = decode(payload, rows, vocab_size)
    got.validate(vocab_size)
    check_sampled_total(got, tau)
    assert_same_but_for_rounding(got, rows)
    np.testing.assert_allclose(head_sums(got), 1 - rows.tail_mass.astype(np.float64), rtol=2e-6, atol=1e-7)
    assert encode_rows(got, vocab_size=vocab_size, tau=tau)[:24] == payload[:24]


@given(st.sampled_from([2, 300, 65537]), st.integers(1, 4), st.integers(0, 10**6), st.integers(1, 300))
def test_top_k_rows_come_back(vocab_size, num_rows, seed, k):
    k = min(k, vocab_size)
    rows = top_k(make_logits(np.random.default_rng(seed), num_rows, vocab_size), k, labels=True)
    got = decode(encode_rows(rows, vocab_size=vocab_size, tau=0), rows, vocab_size)
    got.validate(vocab_size)
    assert_same_but_for_rounding(got, rows)
    np.testing.assert_allclose(head_sums(got), 1 - rows.tail_mass.astype(np.float64), rtol=2e-6, atol=1e-7)


def test_the_mean_of_independently_sampled_rows_is_the_dense_row():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, VOCAB_SIZE)) * 1.5
    p = np.exp(logits[0] - np.log(np.exp(logits[0]).sum()))
    num_draws = 4000
    rows = select(np.repeat(logits, num_draws, axis=0), tau=TAU, rng=rng, labels=False)
    got = decode(encode_rows(rows, vocab_size=VOCAB_SIZE, tau=TAU), rows)
    mean = np.bincount(got.ids, np.exp(got.logprobs.astype(np.float64)), VOCAB_SIZE) / num_draws
    exact = p >= TAU
    np.testing.assert_allclose(mean[exact], p[exact], rtol=2e-3)  # float16
    error = np.sqrt(p * np.maximum(TAU - p, 0) / num_draws)  # Bernoulli draws of weight tau
    assert (np.abs(mean - p)[~exact] < 5 * error[~exact] + 3 * TAU / num_draws).all()  # rare ones: 3 draws
    assert exact.any()
    assert (error < 0.1 * p)[~exact].sum() > 100  # so that a biased sampler would be seen


def test_rounded_logprobs_differ_by_less_than_float16_allows_at_a_real_vocabulary():
    rows = top_k(make_logits(np.random.default_rng(0), 8, 152064), 64, labels=False)
    got = decode(encode_rows(rows, vocab_size=152064, tau=0), rows, 152064)
    assert np.abs(got.logprobs - rows.logprobs).max() < 0.01  # nats


def worked_example():
    rows = SparseRows(
        offsets=np.array([0, 3, 4], np.int64),
        ids=np.array([7, 3, 12, 900], np.int32),
        logprobs=np.log(np.array([0.5, 0.25, 0.25, 1.0])).astype(np.float32),
        num_exact=np.array([2, 1], np.int32),
        tail_mass=np.array([0.25, 0.0], np.float32),
        entropy=np.array([1.3, 0.0], np.float32),
        log_sum_exp=np.zeros((2, 0), np.float32),
    )
    blocks = re.findall(r"```hex (\w+)\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL)
    written = {name: bytes.fromhex(re.sub(r"#.*", "", block)) for name, block in blocks}
    return rows, written


def test_worked_example_of_the_specification_is_what_is_written_and_read():
    rows, written = worked_example()
    assert encode_rows(rows, vocab_size=1000, tau=0.25) == written["rows"]
    got = decode(written["rows"], rows, 1000)
    assert_same_but_for_rounding(got, rows)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 2, "version"),
        (1, 1, "widths"),
        (1, 4, "bytes, its header needs"),
        (2, 3, "widths"),
        (3, 0, "widths"),
        (4, 3, "bytes, its header needs"),
        (7, 255, "bytes, its header needs"),
        (8, 2, "bytes, its header needs"),
        (11, 255, "bytes, its header needs"),
        (15, 255, "bytes, its header needs"),
        (22, 0xF0, "tau"),
        (23, 0xBF, "tau"),
        (24, 1, "row lengths"),
        (26, 0, "row lengths"),
        (29, 0xFF, "outside 0..999"),
        (37, 0xBC, "do not sum to 1"),
        (37, 0xC0, "not falling"),
        (37, 0x7E, "above 0 or not finite"),
        (37, 0x40, "above 0 or not finite"),
        (42, 0, "no draws"),
    ],
)
def test_each_damaged_field_is_refused(position, value, message):
    rows, written = worked_example()
    payload = bytearray(written["rows"])
    assert payload[position] != value
    payload[position] = value
    with pytest.raises(CorruptPartError, match=message):
        decode(bytes(payload), rows, 1000)


def test_scalars_that_do_not_fit_the_payload_are_refused():
    rows, written = worked_example()
    three = np.zeros(3, np.float32)
    with pytest.raises(CorruptPartError, match="2 rows"):
        decode_rows(written["rows"], vocab_size=1000, tail_mass=three, entropy=three)
    with pytest.raises(CorruptPartError, match="label_logprob has 3"):
        decode_rows(written["rows"], vocab_size=1000, label_logprob=three, **scalars(rows))
    wrong = {**scalars(rows), "tail_mass": np.array([0.25, 0.5], np.float32)}
    with pytest.raises(CorruptPartError, match="do not sum to 1"):
        decode_rows(written["rows"], vocab_size=1000, **wrong)


def assert_valid_or_refused(payload, num_rows, vocab_size):
    zero = np.zeros(num_rows, np.float32)
    half = np.full(num_rows, 0.5, np.float32)
    for tail_mass in (zero, half, zero + 1):
        try:
            got = decode_rows(payload, vocab_size=vocab_size, tail_mass=tail_mass, entropy=zero)
        except CorruptPartError:
            continue
        assert got.offsets[-1] == len(got.ids) == len(got.logprobs)
        assert (np.diff(got.offsets) >= 0).all()
        assert got.ids.size == 0 or (got.ids.min() >= 0 and got.ids.max() < vocab_size)
        assert np.isfinite(got.logprobs).all()
        np.testing.assert_allclose(head_sums(got), 1 - tail_mass, atol=2e-6 if got.num_exact.any() else 0.021)


@given(st.binary(max_size=200), st.integers(0, 4))
@example(b"\x01\x02\x01\x01" + b"\xff" * 12 + b"\0" * 8, 2)
@settings(max_examples=examples(300))
def test_arbitrary_bytes_never_do_worse_than_being_refused(payload, num_rows):
    assert_valid_or_refused(payload, num_rows, 300)


@given(st.data())
@settings(max_examples=examples(300))
def test_damaged_payloads_never_do_worse_than_being_refused(data):
    rows, written = worked_example()
    payload = bytearray(written["rows"])
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = bytes(payload[: data.draw(st.integers(0, len(payload)))] + data.draw(st.binary(max_size=4)))
    assert_valid_or_refused(payload, rows.num_rows, 1000)


def test_a_header_that_claims_billions_allocates_next_to_nothing():
    payload = b"\x01\x04\x04\x04" + b"\xff" * 12 + b"\0" * 8 + b"\0" * 100
    empty = np.zeros(0, np.float32)
    tracemalloc.start()
    with pytest.raises(CorruptPartError):
        decode_rows(payload, vocab_size=300, tail_mass=empty, entropy=empty)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
