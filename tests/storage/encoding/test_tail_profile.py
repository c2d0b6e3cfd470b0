"""Tail profiles: what a part keeps, what a cache gives, and what damage does."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from storage.encoding import tail_profile
from storage.encoding.tail_profile import (
    TAIL_TOTAL_KEY,
    TailTotal,
    compute_mean_profile,
    decode_tail_total,
    encode_tail_total,
    select_tail_parts,
)
from storage.errors import CacheError, CorruptPartError
from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.hypothesis_profiles import examples
from tests.storage.synthetic_cache import FAMILIES, VOCAB_SIZE, make_identity, make_part, write_cache

V = 50


@given(arrays(np.float64, V, elements=st.floats(0, 1e3)), st.floats(-200, 0))
def test_mass_is_exact_and_each_value_within_its_step(values, exponent):
    total = values * 2.0**exponent
    num_rows = int(total.sum()) + 1
    got = decode_tail_total(encode_tail_total(TailTotal(total, num_rows)).encode(), V)
    assert got.num_rows == num_rows
    assert got.total.sum() == pytest.approx(total.sum(), rel=1e-9, abs=1e-300)
    large = total > total.max() * 2.0**-31.8
    np.testing.assert_allclose(got.total[large], total[large], rtol=2 ** (2 / 16) - 1)  # a step, and the scaling
    assert (got.total[total == 0] == 0).all()


def test_the_worked_example_of_the_specification_is_read_and_written():
    text = (Path(tail_profile.__file__).parents[1] / "FORMAT.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"```hex tail_total\n(.*?)```", text, re.DOTALL)
    content = bytes.fromhex(re.sub(r"#.*", "", written))
    encoded = encode_tail_total(TailTotal(np.array([0.5, 0.3, 0.0, 2.0]), 10))
    assert base64.b64decode(encoded) == content
    got = decode_tail_total(base64.b64encode(content), 4)
    np.testing.assert_allclose(got.total, [0.5005, 0.2976, 0, 2.0019], atol=1e-4)


def test_the_parts_that_keep_tails_are_few_and_spread():
    assert select_tail_parts(0) == ()
    assert select_tail_parts(1) == (0,)
    assert select_tail_parts(8) == tuple(range(8))
    assert select_tail_parts(1000) == (0, 125, 250, 375, 500, 625, 750, 875)
    for count in range(1, 200):
        parts = select_tail_parts(count)
        assert len(set(parts)) == len(parts) == min(count, 8)
        assert max(parts) < count


def test_the_mean_gives_each_segment_its_rows():
    one, other = np.zeros(V), np.zeros(V)
    one[3], other[5] = 2.0, 1.0
    # 20 of 100 rows leave 0.1 a row at token 3; all 50 rows of another segment leave 0.02 at token 5: 10 and 1
    mean = compute_mean_profile(
        [([TailTotal(one, 20)], 100), ([TailTotal(other / 2, 25), TailTotal(other / 2, 25)], 50)], V
    )
    assert mean.dtype == np.float32
    assert mean[[3, 5]].tolist() == pytest.approx([10 / 11, 1 / 11])
    assert mean.sum() == pytest.approx(1)


def test_where_no_row_has_a_tail_the_profile_is_uniform():
    assert compute_mean_profile([([TailTotal(np.zeros(V), 7)], 7)], V).tolist() == pytest.approx([1 / V] * V)


@pytest.mark.parametrize("total", [[-1.0, 2], [np.nan, 0], [np.inf, 0], [9.0, 2]])
def test_what_is_no_sum_of_tails_is_refused(total):
    with pytest.raises(ValueError, match="the tails of 10 rows"):
        encode_tail_total(TailTotal(np.array(total), 10))


@settings(max_examples=examples(300))
@given(st.data())
def test_any_damage_is_an_error_or_a_sum_of_tails(data):
    content = bytearray(base64.b64decode(encode_tail_total(TailTotal(np.linspace(0, 1, V), 40))))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    text = data.draw(st.sampled_from([base64.b64encode(content), bytes(content), base64.b64encode(content)[:-5]]))
    try:
        got = decode_tail_total(text, V)
    except CorruptPartError:
        return
    assert got.total.shape == (V,)
    assert (got.total >= 0).all()
    assert got.total.sum() <= got.num_rows * 1.01


def write_with_tails(folder: Path, tails: dict[int, np.ndarray], *, num_parts: int) -> None:
    writer = CacheWriter.open(folder, make_identity(num_parts=num_parts), FAMILIES)
    for part in range(num_parts):
        totals = {"response": TailTotal(tails[part], 20)} if part in tails else {}
        writer.write_part(part, replace(make_part(part), tail_totals=totals))
    writer.seal()


def test_a_cache_gives_the_profile_of_the_parts_that_keep_one(tmp_path):
    one, other = np.zeros(VOCAB_SIZE), np.zeros(VOCAB_SIZE)
    one[3], other[[3, 5]] = 2.0, [0.5, 1.5]
    write_with_tails(tmp_path, {0: one, 2: other}, num_parts=3)
    assert verify(tmp_path).problems == []
    cache = Cache.open(tmp_path)
    profile = cache.tail_profile("response")
    assert profile[[3, 5]].tolist() == pytest.approx([2.5 / 4, 1.5 / 4], rel=0.05)
    assert profile.sum() == pytest.approx(1)
    with pytest.raises(CacheError, match="stores no tail profile of visual"):
        cache.tail_profile("visual")
    with pytest.raises(CacheError, match="stores no tail profile of hidden"):
        cache.tail_profile("hidden")


def test_a_cache_that_grows_gives_what_is_there(tmp_path):
    tails = {part: np.full(VOCAB_SIZE, 0.01) for part in range(2)}
    write_with_tails(tmp_path, tails, num_parts=2)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "commits/part-00001.json").unlink()
    assert Cache.open(tmp_path).tail_profile("response").tolist() == pytest.approx([1 / VOCAB_SIZE] * VOCAB_SIZE)


def test_caches_without_tails_say_so(tmp_path):
    write_cache(tmp_path)
    with pytest.raises(CacheError, match="stores no tail profile of response; dump that family again"):
        Cache.open(tmp_path).tail_profile("response")


def test_tails_of_another_vocabulary_or_family_are_refused(tmp_path):
    writer = CacheWriter.open(tmp_path, make_identity(), FAMILIES)
    for family, size, problem in (("response", 7, "the tail total has"), ("relation", VOCAB_SIZE, "expected some of")):
        records = replace(make_part(0), tail_totals={family: TailTotal(np.zeros(size), 1)})
        with pytest.raises(ValueError, match=problem):
            writer.write_part(0, records)


def test_the_sum_lies_in_the_file_that_the_commit_names(tmp_path):
    write_with_tails(tmp_path, {0: np.full(VOCAB_SIZE, 0.01)}, num_parts=1)
    (file,) = (tmp_path / "response").iterdir()
    assert TAIL_TOTAL_KEY.encode() in pq.read_metadata(file).metadata
