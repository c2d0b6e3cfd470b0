"""DPO, IPO and the paired KTO loss: hand-worked numbers, symmetries, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.losses.preference import Rewards, dpo, expand_mean, ipo, kto_pair
from tests.hypothesis_profiles import examples

RATIOS = st.lists(st.tuples(st.floats(-40, 40), st.floats(-40, 40)), min_size=1, max_size=6)


def rewards(pairs, **options) -> Rewards:
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).T
    return Rewards(chosen.clone().requires_grad_(**options), rejected.clone().requires_grad_(**options))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_student_equal_to_the_teacher_has_loss_log_two():
    same = rewards([(0.0, 0.0), (0.0, 0.0)])
    assert dpo(same, beta=0.1).item() == pytest.approx(2 * math.log(2))
    assert kto_pair(same, beta=0.1, kl_chosen=same.chosen, kl_rejected=same.rejected).item() == pytest.approx(1.0)
    assert ipo(same, beta=0.1).item() == pytest.approx(2 * 25.0)


def test_dpo_by_hand():
    # r_w - r_l = 5 + 15 = 20, beta 0.1: -log sigmoid(2) = 0.126928
    assert dpo(rewards([(5.0, -15.0)]), beta=0.1).item() == pytest.approx(0.126928, abs=1e-6)
    smoothed = 0.9 * 0.126928 + 0.1 * 2.126928
    assert dpo(rewards([(5.0, -15.0)]), beta=0.1, label_smoothing=0.1).item() == pytest.approx(smoothed, abs=1e-6)


def test_kto_pair_with_each_pair_its_own_reference_by_hand():
    # KL_l = max(-15, 0) = 0 and KL_w = 5: mean of 1 - sigmoid(0.1 * 5) and 1 - sigmoid(0.1 * (5 + 15)).
    pair = rewards([(5.0, -15.0)])
    value = kto_pair(pair, beta=0.1, kl_chosen=pair.chosen, kl_rejected=pair.rejected)
    assert value.item() == pytest.approx((1 - sigmoid(0.5) + 1 - sigmoid(2.0)) / 2)


def test_kto_pair_with_the_batch_as_reference_by_hand():
    both = rewards([(4.0, -2.0), (2.0, 6.0)])  # means: 3 and 2
    value = kto_pair(both, beta=0.5, kl_chosen=expand_mean(both.chosen), kl_rejected=expand_mean(both.rejected))
    first = (1 - sigmoid(0.5 * (4 - 2))) + (1 - sigmoid(0.5 * (3 + 2)))
    second = (1 - sigmoid(0.5 * (2 - 2))) + (1 - sigmoid(0.5 * (3 - 6)))
    assert value.item() == pytest.approx((first + second) / 2)


def test_the_gradient_of_a_mean_reaches_every_pair_equally():
    values = torch.tensor([4.0, 2.0, -3.0], requires_grad=True)
    means = expand_mean(values)
    assert means.tolist() == [1.0, 1.0, 1.0]
    (gradient,) = torch.autograd.grad(means[0], values)
    assert gradient.tolist() == pytest.approx([1 / 3] * 3)


@settings(max_examples=examples(50))
@given(RATIOS, st.floats(0.01, 1.0))
def test_the_right_order_has_a_lower_loss_than_the_wrong_one(pairs, beta):
    right = rewards([(max(pair), min(pair)) for pair in pairs])
    wrong = rewards([(min(pair), max(pair)) for pair in pairs])
    assert dpo(right, beta=beta).item() <= dpo(wrong, beta=beta).item()
    zeros = torch.zeros(len(pairs), dtype=torch.float64)
    assert (
        kto_pair(right, beta=beta, kl_chosen=zeros, kl_rejected=zeros).item()
        <= kto_pair(wrong, beta=beta, kl_chosen=zeros, kl_rejected=zeros).item()
    )


@settings(max_examples=examples(50))
@given(RATIOS)
def test_gradients_raise_the_chosen_and_lower_the_rejected(pairs):
    both = rewards(pairs)
    chosen, rejected = torch.autograd.grad(dpo(both, beta=0.1), (both.chosen, both.rejected))
    assert (chosen <= 0).all()
    assert (rejected >= 0).all()
    torch.testing.assert_close(chosen, -rejected)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_gradients_agree_with_finite_differences(loss):
    both = rewards([(0.7, -1.3), (-2.0, 0.4), (1.1, 1.9)])

    def value(chosen, rejected):
        each = Rewards(chosen, rejected)
        if loss == "kto":
            return kto_pair(each, beta=0.3, kl_chosen=expand_mean(chosen), kl_rejected=expand_mean(rejected))
        return dpo(each, beta=0.3, label_smoothing=0.2) if loss == "dpo" else ipo(each, beta=0.3)

    assert torch.autograd.gradcheck(value, (both.chosen, both.rejected))


def test_counts_and_margins():
    both = rewards([(5.0, -15.0), (-1.0, 1.0)])
    assert both.num_won.item() == 1
    assert both.margin.item() == pytest.approx(18.0)


def test_no_pairs_have_loss_0_attached_to_the_graph():
    none = Rewards(torch.zeros(0, requires_grad=True), torch.zeros(0, requires_grad=True))
    zeros = torch.zeros(0)
    total = dpo(none, beta=0.1) + ipo(none, beta=0.1) + kto_pair(none, beta=0.1, kl_chosen=zeros, kl_rejected=zeros)
    total.backward()
    assert total.item() == 0
