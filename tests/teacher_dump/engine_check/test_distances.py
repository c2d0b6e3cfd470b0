"""Distances between an engine's states and the model's, against hand-worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from storage.layout.documents import LARGEST_ERROR
from teacher_dump.engine_check.distances import compute_relation_error, compute_row_distances, find_other_widths
from teacher_dump.signals.lm_head import OutputHead

HEAD = OutputHead(torch.eye(2))  # logits are the states


def test_distances_of_two_tokens_are_those_worked_by_hand():
    model, engine = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])  # 3/4, 1/4 against halves
    found = compute_row_distances(HEAD, model, engine, torch.tensor([1]))
    assert found.kl == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)], rel=1e-6)
    assert found.total_variation == pytest.approx([0.25], rel=1e-6)
    assert found.label_logprob == pytest.approx([math.log(2)], rel=1e-6)


def test_equal_states_have_no_distance_and_blocks_of_rows_are_joined():
    draw = torch.Generator().manual_seed(0)
    head = OutputHead(torch.randn(50, 8, generator=draw))
    states = torch.randn(150, 8, generator=draw)
    found = compute_row_distances(head, states, states.clone(), None)
    assert (found.kl.shape, found.kl.max(), found.total_variation.max()) == ((150,), 0.0, 0.0)
    assert found.label_logprob is None
    other = states + 0.1 * torch.randn(150, 8, generator=draw)
    whole = compute_row_distances(head, states, other, torch.arange(150) % 50)
    assert whole.label_logprob is not None
    for at in (0, 63, 64, 149):
        rows = slice(at, at + 1)
        alone = compute_row_distances(head, states[rows], other[rows], torch.tensor([at % 50]))
        assert alone.kl == pytest.approx(whole.kl[rows], rel=1e-4)
        assert alone.label_logprob == pytest.approx(whole.label_logprob[rows], rel=1e-4)
    assert len(compute_row_distances(head, states[:0], other[:0], torch.arange(0)).kl) == 0


def test_states_that_are_not_finite_are_as_far_as_can_be():
    model = torch.zeros(3, 2)
    engine = torch.tensor([[0.0, 0.0], [math.nan, 0.0], [math.inf, 0.0]])
    found = compute_row_distances(HEAD, model, engine, torch.tensor([0, 0, 0]))
    assert found.kl.tolist() == [0.0, LARGEST_ERROR, LARGEST_ERROR]
    assert found.total_variation.tolist() == [0.0, 1.0, 1.0]
    assert compute_relation_error(HEAD, model, engine, centered=False) == 1.0


def test_the_error_of_a_relation_is_one_minus_the_cosine():
    model = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # the matrix of relations is the identity
    engine = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # all ones
    cosine = 2 / (math.sqrt(2) * 2)
    assert compute_relation_error(HEAD, model, engine, centered=False) == pytest.approx(1 - cosine, rel=1e-6)
    assert compute_relation_error(HEAD, model, model.clone(), centered=True) == 0.0


def test_states_of_another_width_are_named():
    one, other = [torch.zeros(2, 8)], [torch.zeros(2, 4)]
    assert find_other_widths(one, one) == ""
    assert find_other_widths(one, other) == "the engine gives states of the shape [2, 4], the model [2, 8]"
    assert np.isfinite(LARGEST_ERROR)
