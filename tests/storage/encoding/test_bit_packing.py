"""Bit fields of varying width."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage.encoding.bit_packing import MAX_WIDTH, bytes_of_bits, field_stops, pack_bits, unpack_bits


def unpack(packed: bytes, widths: np.ndarray) -> list[int]:
    stops = field_stops(widths.astype(np.int32))
    assert len(packed) == bytes_of_bits(int(stops[-1]) if len(stops) else 0)
    return unpack_bits(packed, widths.astype(np.int32), stops).tolist()


def test_fields_lie_least_significant_bit_first():
    # 101 | 1 | 0011 -> bits from the lowest: 101, 1, 1100 0000 0001 -> bytes 0b00111101
    packed = pack_bits(np.array([0b101, 1, 0b0011], np.int32), np.array([3, 1, 4], np.uint8))
    assert packed == bytes([0b0011_1_101])


def test_a_field_may_cross_words_and_be_empty():
    values = np.array([2**31 - 1, 0, 2**30 + 5, 7], np.int32)
    widths = np.array([31, 0, 31, 3], np.uint8)
    packed = pack_bits(values, widths)
    assert len(packed) == 9
    assert unpack(packed, widths) == values.tolist()


def test_nothing_packs_to_nothing():
    values, widths = np.zeros(0, np.int32), np.zeros(0, np.uint8)
    assert pack_bits(values, widths) == b""
    assert unpack(b"", widths) == []
    assert pack_bits(np.zeros(5, np.int32), np.zeros(5, np.uint8)) == b""


@given(st.lists(st.tuples(st.integers(0, MAX_WIDTH), st.integers(0, 2**MAX_WIDTH - 1)), max_size=200))
def test_fields_come_back(fields):
    widths = np.array([width for width, _ in fields], np.uint8)
    values = np.array([value & ((1 << width) - 1) for width, value in fields], np.int32)
    packed = pack_bits(values, widths)
    assert unpack(packed, widths) == values.tolist()


@given(st.lists(st.tuples(st.integers(0, MAX_WIDTH), st.integers(0, 2**MAX_WIDTH - 1)), max_size=50), st.data())
def test_some_fields_come_back_alone(fields, data):
    widths = np.array([width for width, _ in fields], np.int32)
    values = np.array([value & ((1 << width) - 1) for width, value in fields], np.int32)
    packed, stops = pack_bits(values, widths.astype(np.uint8)), field_stops(widths)
    some = np.array(sorted(data.draw(st.sets(st.integers(0, len(fields) - 1)) if fields else st.just(set()))), np.intp)
    assert unpack_bits(packed, widths[some], stops[some]).tolist() == values[some].tolist()
