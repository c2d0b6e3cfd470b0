"""Reading fewer entries than a cache stores gives what a dump of a smaller k, or a higher threshold, had kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import ConfigError
from storage.reader.cache import Cache
from storage.reader.narrowing import Narrowing, narrow_rows
from storage.records.sparse_rows import SparseRows, check_sampled_total
from storage.selection import Sampled, TopK
from tests.hypothesis_profiles import examples
from tests.storage.synthetic_cache import TAU, VOCAB_SIZE, make_logits, select, top_k, write_cache

SMALL = SparseRows(  # one row: 0.5 and 0.2 exactly, 0.1 twice and 0.2 once drawn of a tail of 0.3
    offsets=np.array([0, 4], np.int64),
    ids=np.array([9, 4, 2, 7], np.int32),
    logprobs=np.log(np.array([0.5, 0.2, 0.2, 0.1], np.float32)),
    num_exact=np.array([2], np.int32),
    tail_mass=np.array([0.3], np.float32),
    entropy=np.array([1.5], np.float32),
    log_sum_exp=np.zeros((1, 0), np.float32),
)


def entries(rows: SparseRows) -> list[tuple[int, float]]:
    return list(zip(rows.ids.tolist(), np.exp(rows.logprobs.astype(np.float64)).round(4).tolist(), strict=True))


def test_of_k_entries_the_largest_stay_and_the_tail_grows():
    rows = narrow_rows(SMALL, Narrowing(k=1), np.zeros(1))
    assert entries(rows) == [(9, 0.5)]
    assert rows.tail_mass.tolist() == pytest.approx([0.5])
    assert rows.entropy.tolist() == [1.5]
    assert entries(narrow_rows(SMALL, Narrowing(k=5), np.zeros(1))) == [(9, 0.5), (4, 0.2)]


@pytest.mark.parametrize(
    ("uniform", "drawn"),
    # What is left over lies on the line as 4 from 0 to 0.2, 2 to 0.4, 7 to 0.5; draws at u * 0.4 and 0.4 more.
    [(0.1, [(4, 0.4), (7, 0.4)]), (0.2, [(4, 0.4), (7, 0.4)]), (0.3, [(4, 0.4)]), (0.6, [(2, 0.4)])],
)
def test_what_falls_below_a_higher_threshold_is_drawn_with_its_weight(uniform: float, drawn: list[tuple[int, float]]):
    rows = narrow_rows(SMALL, Narrowing(tau=0.4), np.array([uniform]))
    assert entries(rows) == [(9, 0.5), *drawn]
    assert rows.tail_mass.tolist() == pytest.approx([0.5])


@settings(max_examples=examples(60))
@given(seed=st.integers(0, 10**6), num_rows=st.integers(0, 12), tau=st.floats(TAU, 0.9))
def test_narrowed_rows_are_rows_that_a_cache_may_hold(seed: int, num_rows: int, tau: float):
    rng = np.random.default_rng(seed)
    logits = make_logits(rng, num_rows)
    rows = select(logits, tau=TAU, rng=rng, labels=True)
    higher = narrow_rows(rows, Narrowing(tau=tau), rng.random(num_rows))
    higher.validate(VOCAB_SIZE)
    check_sampled_total(higher, tau + TAU)
    fewer = narrow_rows(rows, Narrowing(k=3), rng.random(num_rows))
    fewer.validate(VOCAB_SIZE)
    assert (fewer.num_exact == np.minimum(rows.num_exact, 3)).all()
    assert fewer.is_exact().all()


def test_fewer_of_the_largest_are_those_of_a_smaller_cache():
    logits = make_logits(np.random.default_rng(3), 40)
    got, expected = (
        narrow_rows(top_k(logits, 32, labels=True), Narrowing(k=5), np.zeros(40)),
        top_k(logits, 5, labels=True),
    )
    assert np.array_equal(got.offsets, expected.offsets)
    assert np.array_equal(got.ids, expected.ids)
    assert np.array_equal(got.logprobs, expected.logprobs)
    np.testing.assert_allclose(got.tail_mass, expected.tail_mass, atol=2e-7)


def test_a_higher_threshold_has_its_own_exact_entries_and_the_dense_row_as_its_mean():
    num_draws, tau = 4000, 0.1
    logits = np.linspace(0, 8, VOCAB_SIZE)
    dense = np.exp(logits - logits.max())
    dense /= dense.sum()
    rng = np.random.default_rng(6)
    rows = select(np.tile(logits, (num_draws, 1)), tau=0.01, rng=rng, labels=False)
    thin = narrow_rows(rows, Narrowing(tau=tau), rng.random(num_draws))
    mean = np.bincount(thin.ids, np.exp(thin.logprobs.astype(np.float64)), VOCAB_SIZE) / num_draws
    deviation = np.sqrt(tau * dense / num_draws) + 1e-9
    assert (np.abs(mean - dense) < 5 * deviation + 1e-6).all()
    assert thin.num_entries < rows.num_entries / 3


def test_a_cache_is_read_narrowed_the_same_way_each_time(tmp_path: Path):
    write_cache(tmp_path, num_parts=2)
    whole = Cache.open(tmp_path)
    thin = Cache.open(tmp_path, narrowing={"response": Narrowing(tau=0.3), "visual": Narrowing(k=1)})
    again = Cache.open(tmp_path, narrowing={"response": Narrowing(tau=0.3), "visual": Narrowing(k=1)})
    fewer = 0
    for index in range(whole.num_samples):
        full, rows = whole.read(index), thin.read(index)
        assert full.response is not None
        assert rows.response is not None
        repeated = again.read_many([index]).record(0).response
        assert repeated is not None
        assert rows.response.equals(repeated)
        assert rows.response.num_rows == full.response.num_rows
        assert (np.exp(rows.response.logprobs[rows.response.is_exact()]) >= 0.3).all()
        fewer += full.response.num_entries - rows.response.num_entries
        assert all((each.num_exact <= 1).all() and each.is_exact().all() for each in rows.visual.values())
    assert fewer > 0


def test_a_threshold_below_the_cache_s_is_refused_when_it_is_opened(tmp_path: Path):
    write_cache(tmp_path, num_parts=1)
    with pytest.raises(ConfigError, match=r"response: tau is 0.01, but the cache was dumped with 0.03"):
        Cache.open(tmp_path, narrowing={"response": Narrowing(tau=0.01)})


def test_selections_that_lack_what_is_asked_for_are_refused():
    with pytest.raises(ConfigError, match="'sampled' keep no entry exactly"):
        Narrowing(k=8).check(Sampled(50), "response")
    with pytest.raises(ConfigError, match="keeps the 32 largest"):
        Narrowing(k=64).check(TopK(32), "visual")
    with pytest.raises(ConfigError, match="selected by 'topk'"):
        Narrowing(tau=0.1).check(TopK(32), "visual")
    with pytest.raises(ValueError, match="give only one of them"):
        Narrowing.of(k=3, tau=0.1)
    assert Narrowing.of(k=None, tau=None) is None
