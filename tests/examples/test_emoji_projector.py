"""The projector's closed form: least squares, exact through a two-layer GELU MLP, best of its rank."""

import pytest
import torch
from torch import nn

from examples.emoji.projector import LowRankMap, fit_projector, fit_ridges, reduce_rank, write_projector


def fit_ridge(x, y, *, ridge: float):
    return fit_ridges(x, y, [ridge])[ridge]


def make_data(*, rows: int = 400, features: int = 12, width: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64) * 3 + 1
    weight = torch.randn(width, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x, x @ weight.T + 5 + 0.1 * noise


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU(approximate="tanh")])
@pytest.mark.parametrize("hidden", [8, 11])
def test_the_mlp_is_the_linear_map_exactly(activation, hidden):
    torch.manual_seed(0)
    x, y = make_data()
    wanted = reduce_rank(*fit_ridge(x, y, ridge=0.1), x, rank=hidden // 2)
    linear_1, linear_2 = nn.Linear(12, hidden).double(), nn.Linear(hidden, 8).double()
    write_projector(linear_1, linear_2, wanted)
    for rows in (x, 100 * x, 1e-3 * x):
        torch.testing.assert_close(linear_2(activation(linear_1(rows))), wanted(rows), rtol=1e-12, atol=1e-9)


def test_a_map_of_too_high_a_rank_is_refused():
    x, y = make_data()
    wanted = reduce_rank(*fit_ridge(x, y, ridge=0.1), x, rank=5)
    with pytest.raises(ValueError, match="rank 5 needs 10 hidden units, got 9"):
        write_projector(nn.Linear(12, 9), nn.Linear(9, 8), wanted)


def test_ridge_regression_by_its_gradient():
    """At the minimum of mean squared error + ridge * scale * |weight|² the gradient is 0, also for the offset."""
    x, y = make_data()
    weight, offset = (part.requires_grad_() for part in fit_ridge(x, y, ridge=0.3))
    scale = (x - x.mean(0)).square().mean(0).mean()
    loss = (x @ weight.T + offset - y).square().sum(1).mean() + 0.3 * scale * weight.square().sum()
    loss.backward()
    for part in (weight, offset):
        assert part.grad is not None
        assert part.grad.abs().max() < 1e-9


def test_full_rank_is_the_whole_map_and_latents_are_standardised():
    x, y = make_data()
    weight, offset = fit_ridge(x, y, ridge=0.1)
    whole = reduce_rank(weight, offset, x, rank=8)
    torch.testing.assert_close(whole(x), x @ weight.T + offset)
    latent = x @ whole.down.T + whole.shift
    torch.testing.assert_close(latent.mean(0), torch.zeros(8, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(latent.square().mean(0), torch.ones(8, dtype=torch.float64))


def test_a_lower_rank_is_the_best_of_its_rank():
    """Eckart and Young: the squared error of the predictions is the sum of the squared singular values left out."""
    x, y = make_data()
    weight, offset = fit_ridge(x, y, ridge=0.1)
    predicted = x @ weight.T + offset
    singular = torch.linalg.svdvals(predicted - predicted.mean(0))
    low = reduce_rank(weight, offset, x, rank=3)
    assert low.down.shape == (3, 12)
    torch.testing.assert_close((low(x) - predicted).square().sum(), singular[3:].square().sum())


def test_the_ridge_is_chosen_on_held_out_rows_and_the_length_is_a_tokens():
    x, y = make_data(rows=14)  # hardly more rows than features: without a penalty it overfits
    torch.manual_seed(1)
    y = y + 20 * torch.randn(y.shape, dtype=torch.float64)
    held_out = make_data(rows=500, seed=0)
    errors = {}
    for ridge in (1e-6, 0.3):
        weight, offset = fit_ridge(x, y, ridge=ridge)
        errors[ridge] = float((held_out[0] @ weight.T + offset - held_out[1]).square().sum(1).mean())
    fitted, best = fit_projector(x, y, held_out=held_out, rank=4, norm=2.5, ridges=(1e-6, 0.3))
    assert best == min(errors, key=errors.__getitem__)
    predicted = fitted(x)
    spread = (predicted - predicted.mean(0)).square().sum(1).mean().sqrt()
    assert float(spread) == pytest.approx(2.5)
    assert isinstance(fitted, LowRankMap)
