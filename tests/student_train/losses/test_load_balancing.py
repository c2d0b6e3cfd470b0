"""Load balance, z-loss, entropy and load of routers, by hand and compared with transformers."""

from __future__ import annotations

import math

import pytest
import torch

from student_train.losses.load_balancing import router_losses, summarize_routers


def test_an_even_router_costs_one_a_layer():
    # Two experts, top 1: each gets half of the tokens, with probability 1/2 on average.
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    losses = router_losses([logits, logits, logits], torch.ones(2, dtype=torch.bool), top_k=1)
    assert losses.balance.item() == pytest.approx(3.0)
    assert losses.load.tolist() == [[0.5, 0.5]] * 3


def test_a_collapsed_router_has_a_balance_loss_up_to_the_number_of_experts():
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(3, 1)
    losses = router_losses([logits], torch.ones(3, dtype=torch.bool), top_k=1)
    assert losses.balance.item() == pytest.approx(4.0)
    assert losses.entropy.item() == pytest.approx(0.0, abs=1e-6)
    assert losses.z.item() == pytest.approx(2500.0, rel=1e-4)


def test_worked_by_hand_with_two_choices_of_three():
    # p = (1/2, 1/4, 1/4) for both tokens; choices are {0, 1}: f = (1/2, 1/2, 0), so 3 * (1/4 + 1/8) = 9/8.
    logits = torch.tensor([[math.log(2.0), 0.0, -1e-6]]).repeat(2, 1)
    losses = router_losses([logits], torch.ones(2, dtype=torch.bool), top_k=2)
    assert losses.balance.item() == pytest.approx(9 / 8, abs=1e-5)
    assert losses.entropy.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4), abs=1e-5)
    assert losses.z.item() == pytest.approx(math.log(4) ** 2, abs=1e-5)


def test_padding_does_not_count():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    is_token = torch.tensor([True, True, False, True, False, True])
    padded = router_losses([logits], is_token, top_k=2)
    plain = router_losses([logits[is_token]], torch.ones(4, dtype=torch.bool), top_k=2)
    for name in ("balance", "z", "load", "entropy"):
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name))


def test_no_tokens_give_zero_attached_to_the_graph():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = router_losses([logits], torch.zeros(3, dtype=torch.bool), top_k=2)
    (losses.balance + losses.z).backward()
    assert losses.balance.item() == 0
    assert losses.z.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_one_layer_is_what_transformers_computes():
    # Theirs counts each of the k choices as a whole, so it is k times ours.
    from student_train.models.huggingface import import_transformers

    theirs = import_transformers().models.qwen2_moe.modeling_qwen2_moe.load_balancing_loss_func
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours = router_losses([logits], torch.ones(50, dtype=torch.bool), top_k=2).balance
    expected = theirs((logits,), num_experts=4, top_k=2) / 2
    torch.testing.assert_close(ours, expected)
    (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (got,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(got, wanted)


def test_statistics_of_batches_equal_those_of_all_their_tokens():
    generator = torch.Generator().manual_seed(2)
    layers = [torch.randn(12, 4, generator=generator) for _ in range(2)]
    everywhere = torch.ones(12, dtype=torch.bool)
    whole = router_losses(layers, everywhere, top_k=2)
    parts = [
        (n, router_losses([layer[a : a + n] for layer in layers], everywhere[:n], top_k=2)) for a, n in ((0, 9), (9, 3))
    ]
    statistics = summarize_routers(parts)
    torch.testing.assert_close(torch.tensor(statistics["load"]), whole.load)
    assert statistics["entropy"] == pytest.approx(float(whole.entropy), rel=1e-5)
    assert statistics["z"] == pytest.approx(float(whole.z) / 2, rel=1e-5)  # a layer
    assert statistics["num_tokens"] == 12
    assert statistics["dropped"] == 0
    assert [sum(layer) for layer in statistics["load"]] == pytest.approx([1, 1])  # no assignment is lost


def test_balance_by_the_first_choice_is_that_of_top2gating() -> None:
    """E * sum_i (share of first choices) * (mean gate), from DeepSpeed's formula, with its gradient."""
    draw = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(64, 4, generator=draw)).double().requires_grad_()
    is_token = torch.arange(64) < 50
    gates = logits[:50].softmax(1)
    first = torch.nn.functional.one_hot(gates.argmax(1), 4).double()
    expected = 4 * (first.mean(0) * gates.mean(0)).sum()
    (slope,) = torch.autograd.grad(expected, logits)
    ours = router_losses([logits], is_token, top_k=2, first_choice=True)
    (gradient,) = torch.autograd.grad(ours.balance, logits)
    torch.testing.assert_close(ours.balance.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-8)
    both = router_losses([logits], is_token, top_k=2)
    assert abs(float((both.balance - ours.balance).detach())) > 1e-3
    torch.testing.assert_close(both.load, ours.load)  # what is watched stays the share of all choices


def test_balance_by_the_first_choice_of_no_tokens_stays_attached() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    losses = router_losses([logits], torch.zeros(3, dtype=torch.bool), top_k=2, first_choice=True)
    assert losses.balance.item() == 0
    losses.balance.backward()
