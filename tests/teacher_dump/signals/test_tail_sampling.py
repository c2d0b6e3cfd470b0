from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_dump.signals.tail_sampling import Draws, draw_independently, draw_systematically
from tests.hypothesis_profiles import examples


def draw_by_definition(weights: np.ndarray, unit: float, uniform: float) -> dict[int, int]:
    """Draws by the definition: token i once for each integer m with c[i-1] <= (u + m) unit < c[i]."""
    drawn: dict[int, int] = {}
    total = 0.0
    for token, weight in enumerate(weights.tolist()):
        before, total = total, total + weight
        hits = [m for m in range(int(total / unit) + 2) if before <= (uniform + m) * unit < total]
        if hits:
            drawn[token] = len(hits)
    return drawn


def as_dictionary(draws: Draws, row: int) -> dict[int, int]:
    mine = draws.rows == row
    return dict(zip(draws.ids[mine].tolist(), draws.counts[mine].tolist(), strict=True))


@settings(max_examples=examples(60))
@given(st.integers(0, 10_000), st.sampled_from([1, 63, 64, 65, 200]), st.floats(0.0, 0.999), st.floats(0.05, 3.0))
def test_systematic_draws_are_those_of_the_definition(seed: int, vocab: int, uniform: float, unit: float) -> None:
    draw = np.random.default_rng(seed)
    weights = (draw.integers(0, 8, vocab) / 8).astype(np.float32)  # sums are exact, ends included
    drawn = draw_systematically(
        torch.from_numpy(weights)[None], unit=torch.tensor([unit], dtype=torch.float64), uniforms=np.array([uniform])
    )
    assert as_dictionary(drawn, 0) == draw_by_definition(weights, unit, uniform)


def test_a_token_without_weight_is_never_drawn() -> None:
    weights = torch.zeros(500, 130)
    weights[:, [0, 64, 129]] = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    uniforms = np.random.default_rng(0).random(500)
    drawn = draw_systematically(weights, unit=torch.full((500,), 0.01), uniforms=uniforms)
    assert set(drawn.ids.tolist()) == {0, 64, 129}
    wanted = weights.double().sum(dim=1).numpy() / 0.01
    assert (np.abs(np.bincount(drawn.rows, drawn.counts, 500) - wanted) < 1.0001).all()


def test_rows_without_weight_and_no_rows_at_all() -> None:
    assert not len(draw_systematically(torch.zeros(3, 70), unit=torch.ones(3), uniforms=np.zeros(3)).ids)
    assert not len(draw_systematically(torch.zeros(0, 70), unit=torch.ones(0), uniforms=np.zeros(0)).ids)
    assert not len(draw_independently(torch.zeros(0, 70), num_draws=4, uniforms=np.zeros(0)).ids)


def test_independent_draws_are_as_many_as_asked_for_and_the_same_again() -> None:
    weights = torch.rand(5, 40, generator=torch.Generator().manual_seed(1))
    uniforms = np.random.default_rng(2).random(5)
    first, second = (draw_independently(weights, num_draws=17, uniforms=uniforms) for _ in range(2))
    assert np.bincount(first.rows, first.counts).tolist() == [17] * 5
    assert (first.ids == second.ids).all()
    assert (first.counts == second.counts).all()
