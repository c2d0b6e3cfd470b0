import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.encoding.output_head import StoredHead, decode_head, encode_head, make_head
from storage.errors import CorruptPartError
from tests.hypothesis_profiles import examples

FORMAT = Path(__file__).parents[3] / "storage" / "FORMAT.md"


def weights(kind, shape=(50, 8), seed=0):
    """float32 weights that bfloat16, float16 or only float32 holds exactly."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if kind == "bfloat16":
        return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return values.astype(np.float16).astype(np.float32) if kind == "float16" else values


HEADS = [
    make_head(weights("bfloat16")),
    make_head(weights("float16"), scale=0.25),
    make_head(weights("float32"), np.linspace(0, 5, 50, dtype=np.float32)),
    make_head(weights("float32"), scale=3.0, soft_cap=5.0),
]


def compute_logits_in_float64(weight, hidden, bias: Any = 0.0, scale=1.0, soft_cap=None):
    logits = (hidden.astype(np.float64) @ weight.astype(np.float64).T + bias) * scale
    return logits if soft_cap is None else np.tanh(logits / soft_cap) * soft_cap


@pytest.mark.parametrize(("kind", "dtype"), [("bfloat16", "uint16"), ("float16", "float16"), ("float32", "float32")])
@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"scale": 2.0, "soft_cap": 3.0}])
def test_logits_are_those_of_the_float64_reference_after_a_round_trip(kind, dtype, options):
    weight, bias = weights(kind, (20000, 8)), np.linspace(-1, 1, 20000, dtype=np.float32)
    head = decode_head(encode_head(make_head(weight, bias, **options)))
    assert head.weight.dtype == dtype
    hidden = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    expected = compute_logits_in_float64(weight, hidden, bias, **options)
    assert head.logits(hidden).dtype == np.float32
    np.testing.assert_allclose(head.logits(hidden), expected, atol=3e-5)
    logprobs = head.logprobs(hidden)
    np.testing.assert_allclose(np.exp(logprobs.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(logprobs - logprobs[:, :1], expected - expected[:, :1], atol=6e-5)
    assert head.logits(hidden[:0]).shape == (0, 20000)


def test_hidden_states_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 7\), the head needs \(rows, 8\)"):
        HEADS[0].logits(np.zeros((3, 7), np.float32))


@pytest.mark.parametrize("head", HEADS)
def test_the_file_is_deterministic_and_safetensors_reads_it(head):
    safetensors = pytest.importorskip("safetensors.numpy")
    content = encode_head(head)
    assert encode_head(decode_head(content)) == content
    if head.weight.dtype != np.uint16:  # NumPy has no bfloat16
        tensors = safetensors.load(content)
        np.testing.assert_array_equal(tensors["weight"], head.weight)
        assert ("bias" in tensors) == (head.bias is not None)


@pytest.mark.parametrize(
    "head",
    [
        StoredHead(np.zeros(3, np.float32)),
        StoredHead(np.zeros((3, 0), np.float32)),
        StoredHead(np.zeros((3, 2))),
        StoredHead(np.full((3, 2), np.inf, np.float32)),
        StoredHead(np.full((3, 2), 0x7F80, np.uint16)),  # infinity in bfloat16
        StoredHead(np.zeros((3, 2), np.float32), np.zeros(2, np.float32)),
        StoredHead(np.zeros((3, 2), np.float32), np.full(3, np.nan, np.float32)),
        StoredHead(np.zeros((3, 2), np.float32), scale=float("nan")),
        StoredHead(np.zeros((3, 2), np.float32), soft_cap=0.0),
    ],
)
def test_what_is_no_head_is_refused(head):
    with pytest.raises(ValueError, match="a head"):
        encode_head(head)


def assert_valid_or_refused(content):
    try:
        head = decode_head(content)
    except CorruptPartError:
        return
    assert np.isfinite(head.logits(np.zeros((1, head.width), np.float32))).all()


@given(st.binary(max_size=100) | st.binary(max_size=100).map(lambda text: len(text).to_bytes(8, "little") + text))
@settings(max_examples=examples(300))
def test_arbitrary_bytes_never_do_worse_than_being_refused(content):
    assert_valid_or_refused(content)


@given(st.sampled_from(HEADS), st.data())
@settings(max_examples=examples(400))
def test_damaged_files_never_do_worse_than_being_refused(head, data):
    content = bytearray(encode_head(head))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(200, len(content) - 1)))] ^= 1 << data.draw(st.integers(0, 7))
    with np.errstate(over="ignore", invalid="ignore"):  # a flipped exponent may leave a huge finite weight
        assert_valid_or_refused(bytes(content))


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"{}", b"null", b'{"weight":3}', b'{"weight":{"dtype":"F32"}}', b'{"weight":[]}', b"[" * 60000,
        b'{"weight":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]},"__metadata__":{"scale":"1"}}',
        b'{"weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},"__metadata__":{"scale":"x"}}',
        b'{"weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},"__metadata__":{"scale":[]}}',
        b'{"weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},"__metadata__":[]}',
        b'{"weight":{"dtype":"F32","shape":[1,-1],"data_offsets":[0,4]},"__metadata__":{"scale":"1"}}',
        b'{"weight":{"dtype":"F32","shape":[true,1],"data_offsets":[0,4]},"__metadata__":{"scale":"1"}}',
        b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"scale":"1"}}',
        b'{"weight":{"dtype":"I64","shape":[1,1],"data_offsets":[0,4]},"__metadata__":{"scale":"1"}}',
        b'{"other":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},"__metadata__":{"scale":"1"}}',
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(header):
    with pytest.raises(CorruptPartError):
        decode_head(len(header).to_bytes(8, "little") + header + b"\0" * 4)


def test_worked_example_of_the_specification_is_what_is_written_and_read():
    blocks = re.findall(r"```hex (\w+)\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL)
    written = {name: bytes.fromhex(re.sub(r"#.*", "", block)) for name, block in blocks}
    head = make_head(np.array([[1, 0], [0.5, -2]], np.float32), scale=0.25)
    assert encode_head(head) == written["head"]
    np.testing.assert_array_equal(
        decode_head(written["head"]).logits(np.eye(2, dtype=np.float32)), [[0.25, 0.125], [0, -0.5]]
    )
