from __future__ import annotations

import numpy as np
import pytest

from storage.records.records import TokensRecord
from storage.records.sample_key import SampleKey


def test_the_text_of_a_key_names_copy_and_half() -> None:
    keys = [
        SampleKey("a"),
        SampleKey("a", copy=1, source=3),
        SampleKey("a", "chosen"),
        SampleKey("a", "rejected", 9),
    ]
    assert [key.sample_id for key in keys] == ["a", "a~2", "a#chosen", "a~10#rejected"]


def test_halves_of_one_copy_of_one_row_belong_together() -> None:
    chosen = SampleKey("a", "chosen", 1, 2)
    assert chosen.other_half == SampleKey("a", "rejected", 1, 2)
    assert chosen.other_half.other_half == chosen
    assert chosen.whole == chosen.other_half.whole == SampleKey("a", None, 1, 2)
    for other in (SampleKey("b", "chosen", 1, 2), SampleKey("a", "chosen", 0, 2), SampleKey("a", "chosen", 1)):
        assert other.whole != chosen.whole


def test_equal_texts_of_own_ids_are_other_keys() -> None:
    assert SampleKey("a#chosen").sample_id == SampleKey("a", "chosen").sample_id
    assert SampleKey("a#chosen") != SampleKey("a", "chosen")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"half": "best"}, "half of sample 'a' is 'best'"),
        ({"half": ""}, "half of sample 'a' is ''"),
        ({"copy": -1}, "copy -1 of source 0"),
        ({"source": 2**31}, "of source 2147483648"),
    ],
)
def test_impossible_keys_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        SampleKey("a", **fields)


def test_a_record_needs_a_key_and_no_text() -> None:
    ids = np.array([1, 2], np.int32)
    assert TokensRecord(SampleKey("a"), "train", "", ids, ids > 1).sample_id == "a"
    with pytest.raises(TypeError, match=r"key is 'a', expected a SampleKey, such as SampleKey\('a'\)"):
        TokensRecord("a", "train", "", ids, ids > 1)  # type: ignore[arg-type]
