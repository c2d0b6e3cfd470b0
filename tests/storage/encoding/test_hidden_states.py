import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.encoding.hidden_states import compute_relative_errors, decode_hidden, encode_hidden
from storage.errors import CorruptPartError
from tests.hypothesis_profiles import examples

FORMAT = Path(__file__).parents[3] / "storage" / "FORMAT.md"
EXAMPLE = np.array([[0.5, -1, 2], [0, 0, 0]], np.float32)


@pytest.mark.parametrize(("encoding", "bound"), [("float16", 2**-11), ("int8", 0.03)])
@given(num_rows=st.integers(0, 6), width=st.integers(1, 40), scale=st.floats(0.1, 1000), seed=st.integers(0, 10**6))
def test_states_come_back_within_a_bound_a_row(encoding, bound, num_rows, width, scale, seed):
    states = (np.random.default_rng(seed).normal(size=(num_rows, width)) * scale).astype(np.float32)
    got = decode_hidden(encode_hidden(states, encoding))
    assert got.dtype == np.float32
    assert got.shape == states.shape
    errors = compute_relative_errors(states, got)
    for row in range(num_rows):  # the slow reference
        expected = np.linalg.norm(got[row] - states[row]) / np.linalg.norm(states[row])
        assert errors[row] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert (errors <= bound).all()


def test_bfloat16_states_are_exact_in_float16():
    rng = np.random.default_rng(0)
    states = (rng.normal(size=(5, 64)) * 10).astype(np.float32)
    states = (states.view(np.uint32) & 0xFFFF0000).view(np.float32)
    states[np.abs(states) < 1e-3] = 0
    np.testing.assert_array_equal(decode_hidden(encode_hidden(states, "float16")), states)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (np.zeros(3, np.float32), "float32"),
        (np.zeros((2, 3)), "float32"),
        (np.full((1, 2), np.nan, np.float32), "finite"),
        (np.full((1, 2), 65600, np.float32), "beyond float16, at most 65504; set cache.hidden.encoding to int8"),
    ],
)
def test_what_cannot_be_held_is_refused(states, message):
    with pytest.raises(ValueError, match=message):
        encode_hidden(states, "float16")


def test_int8_holds_what_float16_cannot():
    states = np.array([[1e6, -2e6]], np.float32)
    np.testing.assert_allclose(decode_hidden(encode_hidden(states, "int8")), states, rtol=0.01)


def assert_valid_or_refused(payload):
    try:
        states = decode_hidden(payload)
    except CorruptPartError:
        return
    assert np.isfinite(states).all()
    assert states.nbytes <= 4 * len(payload)


@given(st.binary(max_size=80))
@settings(max_examples=examples(400))
def test_arbitrary_bytes_never_do_worse_than_being_refused(payload):
    assert_valid_or_refused(payload)


@given(st.integers(0, 1), st.integers(0, 3), st.integers(1, 4), st.binary(min_size=40, max_size=40))
@settings(max_examples=examples(400))
def test_arbitrary_content_under_a_right_header_is_valid_or_refused(kind, num_rows, width, content):
    size = 2 * num_rows * width if kind == 0 else num_rows * (4 + width)
    assert_valid_or_refused(struct.pack("<BBxxII", 1, kind, num_rows, width) + content[:size])


@given(st.sampled_from(["float16", "int8"]), st.data())
@settings(max_examples=examples(300))
def test_damaged_payloads_never_do_worse_than_being_refused(encoding, data):
    payload = bytearray(encode_hidden(EXAMPLE, encoding))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert_valid_or_refused(bytes(payload[: data.draw(st.integers(0, len(payload)))]))


def test_a_header_that_claims_billions_allocates_next_to_nothing():
    tracemalloc.start()
    for kind in (0, 1):
        with pytest.raises(CorruptPartError):
            decode_hidden(struct.pack("<BBxxII", 1, kind, 2**32 - 1, 2**32 - 1) + b"\0" * 100)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_worked_examples_of_the_specification_are_what_is_written_and_read():
    blocks = re.findall(r"```hex (\w+)\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL)
    written = {name: bytes.fromhex(re.sub(r"#.*", "", block)) for name, block in blocks}
    assert encode_hidden(EXAMPLE, "float16") == written["hidden"]
    assert encode_hidden(EXAMPLE, "int8") == written["hidden_int8"]
    np.testing.assert_array_equal(decode_hidden(written["hidden"]), EXAMPLE)
    np.testing.assert_allclose(decode_hidden(written["hidden_int8"]), EXAMPLE, atol=8e-3)
