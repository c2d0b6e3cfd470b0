from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.records.sparse_rows import SparseRows
from storage.selection import Mass, Sampled, Selection, Threshold, TopK
from teacher_dump.signals.sparsify import join_blocks, make_row_uniforms, select_blocks, select_rows
from tests.hypothesis_profiles import examples


def random_logits(rows: int, vocab: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def select(logits: torch.Tensor, selection: Selection, *, seed: int = 0, labels: bool = True) -> SparseRows:
    rows = select_rows(
        logits,
        labels=torch.arange(len(logits)) % logits.shape[1] if labels else None,
        selection=selection,
        uniforms=make_row_uniforms(len(logits), seed=seed, family="response", key="x"),
    )
    rows.validate(logits.shape[1])
    return rows


def log_softmax(logits: torch.Tensor) -> np.ndarray:
    """The slow reference, in float64."""
    wide = logits.double().numpy()
    shifted = wide - wide.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def weights(rows: SparseRows, vocab: int) -> np.ndarray:
    """Dense (r, v) array of stored probabilities and weights."""
    dense = np.zeros((rows.num_rows, vocab))
    dense[rows.row_of_entry(), rows.ids] = np.exp(rows.logprobs.astype(np.float64))
    return dense


@pytest.mark.parametrize("selection", [TopK(5), TopK(1000), Threshold(0.02), Threshold(0.3), Mass(0.7)])
def test_scalars_and_exact_entries_equal_the_float64_reference(selection: Selection) -> None:
    logits = random_logits(40, 100)
    rows, expected = select(logits, selection), log_softmax(logits)
    np.testing.assert_allclose(rows.entropy, -(np.exp(expected) * expected).sum(axis=1), atol=1e-5)
    assert rows.label_logprob is not None
    np.testing.assert_allclose(rows.label_logprob, expected[np.arange(40), np.arange(40)], atol=1e-5)
    exact = rows.is_exact()
    np.testing.assert_allclose(rows.logprobs[exact], expected[rows.row_of_entry()[exact], rows.ids[exact]], atol=1e-5)
    for row in range(rows.num_rows):
        start, count = rows.offsets[row], rows.num_exact[row]
        falling = np.argsort(-expected[row], kind="stable")[:count]
        assert rows.ids[start : start + count].tolist() == falling.tolist()
        tail = 1 - np.exp(expected[row, falling]).sum()
        np.testing.assert_allclose(rows.tail_mass[row], tail, atol=1e-6)
        p = np.sort(np.exp(expected[row]))[::-1]
        if isinstance(selection, Threshold):
            assert count == (p >= selection.tau).sum()
        elif isinstance(selection, Mass):
            assert p[:count].sum() >= selection.mass - 1e-6 > p[: count - 1].sum() - 1e-6
        else:
            assert isinstance(selection, TopK)
            assert count == min(selection.k, 100)


def test_rows_sum_to_one_with_their_tail_even_when_the_tail_is_tiny() -> None:
    logits = torch.full((1, 50), -20.0)
    logits[0, 7] = 0.0
    rows = select(logits, TopK(1))
    np.testing.assert_allclose(rows.tail_mass, [49 * np.exp(-20) / (1 + 49 * np.exp(-20))], rtol=1e-5)
    for selection in (TopK(3), Threshold(0.01)):
        rows = select(random_logits(200, 300, scale=2.0), selection)
        exact = rows.is_exact()
        head = np.bincount(rows.row_of_entry()[exact], np.exp(rows.logprobs[exact]), 200)
        np.testing.assert_allclose(head + rows.tail_mass, 1, atol=2e-6)


@settings(max_examples=examples(30))
@given(st.integers(0, 10_000), st.sampled_from([0.5, 0.1, 0.01, 0.003]), st.floats(0.0, 6.0))
def test_total_of_a_sampled_row_is_within_tau_of_one(seed: int, tau: float, scale: float) -> None:
    logits = random_logits(20, 200, seed=seed, scale=scale)
    rows = select(logits, Threshold(tau), seed=seed)
    total = np.bincount(rows.row_of_entry(), np.exp(rows.logprobs.astype(np.float64)), 20)
    assert np.abs(total - 1).max() <= tau + 1e-5


def test_the_mean_of_many_sampled_rows_is_the_dense_row() -> None:
    logits = random_logits(1, 60, scale=1.5)
    tau, num_draws = 0.05, 40_000
    dense = np.exp(log_softmax(logits))[0]
    rows = select(logits.expand(num_draws, -1), Threshold(tau), labels=False)
    mean = weights(rows, 60).mean(axis=0)
    sampled = dense < tau
    np.testing.assert_allclose(mean[~sampled], dense[~sampled], atol=1e-6)
    # A draw of weight tau and probability p / tau has the variance p tau - p^2; 5 standard errors.
    bound = 5 * np.sqrt((dense * tau - dense**2)[sampled] / num_draws)
    assert (np.abs(mean - dense)[sampled] < bound).all()


def test_small_entries_of_a_large_vocabulary_are_drawn_as_often_as_they_should() -> None:
    """Steps of 1e-4 in a cumulative sum near 50: summed in float32 they would drift."""
    logits = torch.zeros(64, 50_000)
    logits[:, :1000] = 6.0  # 1,000 entries with most of the mass, then 49,000 that together hold 10.8 %
    rows = select(logits, Threshold(0.02), labels=False)
    rare = np.exp(log_softmax(logits[:1]))[0, 1000:].sum()
    drawn = (rows.ids >= 1000).sum() * 0.02 / 64
    np.testing.assert_allclose(drawn, rare, atol=0.01)


def test_a_retry_draws_the_same_and_another_seed_or_key_does_not() -> None:
    base = make_row_uniforms(5, seed=0, family="response", key="x")
    assert (base == make_row_uniforms(5, seed=0, family="response", key="x")).all()
    assert (base[:3] == make_row_uniforms(3, seed=0, family="response", key="x")).all()
    for changed in ({"seed": 1}, {"family": "visual"}, {"key": "y"}):
        others = {"seed": 0, "family": "response", "key": "x", **changed}
        assert (base != make_row_uniforms(5, **others)).all()
    logits = random_logits(10, 100)
    assert select(logits, Threshold(0.05)).equals(select(logits, Threshold(0.05)))
    assert not select(logits, Threshold(0.05)).equals(select(logits, Threshold(0.05), seed=1))


def test_draws_by_hand() -> None:
    """p = .4 .3 .2 .1 and tau = .5: steps .8 .6 .4 .2, sums .8 1.4 1.8 2; u = .5 hits .5 and 1.5."""
    rows = select_rows(
        torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log(),
        labels=None,
        selection=Threshold(0.5),
        uniforms=np.array([0.5]),
    )
    assert rows.ids.tolist() == [0, 2]
    np.testing.assert_allclose(np.exp(rows.logprobs), [0.5, 0.5])
    assert rows.num_exact.tolist() == [0]
    np.testing.assert_allclose(rows.tail_mass, [1.0], rtol=1e-6)


def test_no_rows_and_bad_rows() -> None:
    assert select(torch.zeros(0, 10), Threshold(0.1), labels=False).num_rows == 0
    assert select(torch.zeros(0, 10), TopK(3)).num_rows == 0
    with pytest.raises(ValueError, match="not finite"):
        select(torch.tensor([[0.0, float("nan")]]), TopK(1))


def test_log_sum_exps_at_other_temperatures_are_of_the_logprobs() -> None:
    logits = random_logits(6, 50)
    uniforms = np.zeros(6)
    rows = select_rows(logits, labels=None, selection=TopK(4), uniforms=uniforms, temperatures=(2.0, 0.5))
    logprobs = log_softmax(logits)
    for column, temperature in enumerate((2.0, 0.5)):
        expected = np.log(np.exp(logprobs / temperature).sum(axis=1))
        np.testing.assert_allclose(rows.log_sum_exp[:, column], expected, atol=1e-5)
    head = np.exp(rows.logprobs.astype(np.float64) / 2 - np.repeat(rows.log_sum_exp[:, 0], 4)).reshape(6, 4).sum(axis=1)
    tempered = np.exp(logprobs / 2) / np.exp(logprobs / 2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(head, np.sort(tempered, axis=1)[:, -4:].sum(axis=1), atol=1e-5)


def test_independent_draws_are_unbiased_and_make_up_the_whole_row() -> None:
    logits = random_logits(1, 30)
    total = np.zeros(30)
    for seed in range(400):
        uniforms = make_row_uniforms(1, seed=seed, family="response", key="a")
        rows = select_rows(logits, labels=None, selection=Sampled(25), uniforms=uniforms)
        rows.validate(30)
        assert rows.num_exact.tolist() == [0]
        np.testing.assert_allclose(rows.tail_mass, [1], atol=1e-6)
        np.testing.assert_allclose(np.exp(rows.logprobs).sum(), 1, atol=1e-5)
        total += weights(rows, 30)[0]
    p = np.exp(log_softmax(logits))[0]
    np.testing.assert_allclose(total / 400, p, atol=4 * np.sqrt(p * (1 - p) / (400 * 25)).max())


@pytest.mark.parametrize("selection", [TopK(50), TopK(3), Mass(0.999), Threshold(0.01), Sampled(20)])
def test_a_token_that_the_teacher_suppresses_is_never_stored(selection: Selection) -> None:
    logits = random_logits(5, 50)
    logits[:, 7] = -torch.inf
    rows = select(logits, selection)
    rows.validate(50)
    assert 7 not in rows.ids


def select_sets(logits: torch.Tensor, selection: Selection, num_sets: int, *, seed: int = 0) -> SparseRows:
    uniforms = make_row_uniforms(len(logits), seed=seed, family="response", key="x", num_sets=num_sets)
    rows = select_rows(logits, labels=None, selection=selection, uniforms=uniforms)
    rows.validate(logits.shape[1])
    return rows


@pytest.mark.parametrize("selection", [Threshold(0.05), Sampled(10)])
def test_each_set_of_draws_is_unbiased_and_independent_of_the_others(selection: Selection) -> None:
    """Over 3,000 equal rows the mean of each set is the dense row, and two sets' errors do not go together."""
    logits = random_logits(1, 30, seed=4, scale=1.0)
    expected = np.exp(log_softmax(logits))[0]
    rows = select_sets(logits.expand(3000, -1), selection, 3)
    dense = np.stack([weights(each, 30) for each in (rows, *rows.other_sets)])  # (sets, r, v)
    assert len(dense) == 3
    spread = dense.std(axis=1)
    for of_set in dense:
        np.testing.assert_allclose(of_set.mean(axis=0), expected, atol=4.5 * spread.max() / np.sqrt(3000))
    errors = dense - expected
    for one, other in ((0, 1), (0, 2), (1, 2)):
        together = (errors[one] * errors[other]).sum(axis=1).mean()
        alone = (errors[one] ** 2).sum(axis=1).mean()
        assert abs(together) < 0.05 * alone


def test_sets_share_exact_entries_and_scalars_and_the_first_is_that_of_one_set() -> None:
    logits = random_logits(20, 100)
    rows = select_sets(logits, Threshold(0.05), 3)
    assert rows.slice(0, 20).other_sets[1].equals(rows.other_sets[1])
    alone = select_sets(logits, Threshold(0.05), 1)
    assert alone.equals(SparseRows(**{**vars(rows), "other_sets": ()}))
    joined = SparseRows.concatenate([rows.slice(0, 7), rows.slice(7, 20)])
    assert joined.equals(rows)
    assert rows.copy().equals(rows)
    with pytest.raises(ValueError, match="zip"):
        SparseRows.concatenate([rows, alone])


@pytest.mark.parametrize("selection", [TopK(5), Threshold(0.02), Threshold(0.3), Mass(0.7), Sampled(10)])
def test_the_selection_error_is_the_distance_from_the_dense_row(selection: Selection) -> None:
    logits = random_logits(40, 100)
    expected = np.exp(log_softmax(logits))
    rows = select_sets(logits, selection, 2)
    for each in (rows, *rows.other_sets):
        distance = np.linalg.norm(weights(each, 100) - expected, axis=1)
        assert each.selection_error is not None
        np.testing.assert_allclose(each.selection_error, distance, atol=2e-6)


@pytest.mark.parametrize("selection", [TopK(5), Threshold(0.02), Mass(0.7), Sampled(10)])
def test_tails_are_summed_over_rows(selection: Selection) -> None:
    logits = random_logits(40, 100)
    probs = np.exp(log_softmax(logits))
    selected = select_blocks(logits, labels=None, selection=selection, uniforms=np.full(40, 0.5), sums_tails=True)
    rows = join_blocks(selected.blocks)
    exact = rows.is_exact()
    probs[rows.row_of_entry()[exact], rows.ids[exact]] = 0
    assert selected.tail_sum is not None
    np.testing.assert_allclose(selected.tail_sum.numpy(), probs.sum(axis=0), rtol=1e-5, atol=1e-9)


def test_joining_blocks_copies_every_entry_once() -> None:
    """A second copy would need memory for it beside the joined rows."""
    uniforms = np.full(256, 0.5)
    blocks = [
        block
        for start in range(0, 256, 32)
        for block in select_blocks(
            random_logits(32, 1000, seed=start), labels=None, selection=TopK(900), uniforms=uniforms[start : start + 32]
        ).blocks
    ]
    assert len(blocks) == 8
    tracemalloc.start()
    try:
        rows = join_blocks(blocks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows.num_entries == 256 * 900
    assert rows.num_bytes < peak < 1.6 * rows.num_bytes  # the rest is where a block's entries go


def test_joined_blocks_are_the_rows_of_each_block_in_order() -> None:
    logits = random_logits(60, 100)
    uniforms = make_row_uniforms(60, seed=0, family="response", key="x", num_sets=2)
    for selection in (TopK(5), Threshold(0.05), Mass(0.8), Sampled(10)):
        cuts = [slice(0, 7), slice(7, 8), slice(8, 60)]
        settings = [{"labels": None, "selection": selection, "uniforms": uniforms[cut]} for cut in cuts]
        blocks = [select_blocks(logits[cut], **own).blocks for cut, own in zip(cuts, settings, strict=True)]
        alone = [select_rows(logits[cut], **own) for cut, own in zip(cuts, settings, strict=True)]
        joined = join_blocks([block for of_cut in blocks for block in of_cut])
        joined.validate(100)
        assert joined.equals(SparseRows.concatenate(alone))


def test_no_rows_have_as_many_sets_as_others() -> None:
    rows = select_sets(torch.zeros(0, 50), Threshold(0.1), 3)
    assert rows.num_rows == 0
    assert len(rows.other_sets) == 2
