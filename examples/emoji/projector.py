"""Starts a two-layer GELU projector in closed form: ridge regression from image features to token embeddings.

From random weights the projector of a frozen tower and a trained decoder learns nothing in the time of this
experiment. So each visual token starts as the best linear guess of what the picture's answers look like as tokens.

An MLP with GELU can be exactly linear, since GELU(x) − GELU(−x) = x·Φ(x) + x·Φ(−x) = x: half of the hidden units
hold a latent vector z and half −z, and the second layer takes differences. With h hidden units the linear map may
have rank h / 2, so of the regression's map the h / 2 directions with the largest variance of the prediction are kept.

Legend: n rows (one for each visual token of each picture), f feature width, d embedding width, r latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # candidates, times the mean variance of a feature


@dataclass(frozen=True)
class LowRankMap:
    """x ↦ offset + up · (down · x + shift), where the latent values have mean 0 and variance 1 on the fitted rows."""

    down: Float[Tensor, "r f"]
    shift: Float[Tensor, " r"]
    up: Float[Tensor, "d r"]
    offset: Float[Tensor, " d"]

    def __call__(self, rows: Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        return (rows @ self.down.T + self.shift) @ self.up.T + self.offset


def fit_ridges(
    features: Float[Tensor, "n f"], targets: Float[Tensor, "n d"], ridges: Sequence[float]
) -> dict[float, tuple[Float[Tensor, "d f"], Float[Tensor, " d"]]]:
    """For each ridge, weight and offset of the linear map with the least squared error plus ridge times |weight|².

    Ridges are in units of the features' mean variance; the offset is not penalised. Computed in float64.
    """
    features, targets = features.double(), targets.double()
    mean, target_mean = features.mean(0), targets.mean(0)
    centred = features - mean
    covariance = centred.T @ centred / len(centred)
    products = centred.T @ (targets - target_mean) / len(centred)
    unit = covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    weights = {ridge: torch.linalg.solve(covariance + ridge * unit, products).T for ridge in ridges}
    return {ridge: (weight, target_mean - weight @ mean) for ridge, weight in weights.items()}


def reduce_rank(
    weight: Float[Tensor, "d f"], offset: Float[Tensor, " d"], features: Float[Tensor, "n f"], *, rank: int
) -> LowRankMap:
    """The map of rank `rank` or less whose predictions on these features are closest to the given map's."""
    features = features.double()
    mean = features.mean(0)
    predicted = (features - mean) @ weight.T
    variances, directions = torch.linalg.eigh(predicted.T @ predicted / len(predicted))  # ascending
    variances, directions = variances.flip(0)[:rank], directions.flip(1)[:, :rank]
    kept = variances > variances[0] * 1e-12
    scales, directions = variances[kept].sqrt(), directions[:, kept]
    down = (directions / scales).T @ weight
    return LowRankMap(down=down, shift=-down @ mean, up=directions * scales, offset=offset + weight @ mean)


def fit_projector(
    features: Float[Tensor, "n f"],
    targets: Float[Tensor, "n d"],
    *,
    held_out: tuple[Float[Tensor, "m f"], Float[Tensor, "m d"]],
    rank: int,
    norm: float,
    ridges: Sequence[float] = RIDGES,
) -> tuple[LowRankMap, float]:
    """The map with the ridge that predicts `held_out` best, and that ridge.

    Regression shrinks its predictions towards their mean, but the decoder expects vectors of a token's length: the
    map's deviations from the mean are scaled to a mean square of `norm` squared on the fitted rows.
    """
    fits = fit_ridges(features, targets, ridges)
    seen, wanted = (part.double() for part in held_out)
    errors = {
        ridge: float(((seen @ weight.T + offset - wanted) ** 2).sum(1).mean())
        for ridge, (weight, offset) in fits.items()
    }
    best = min(errors, key=errors.__getitem__)
    fitted = reduce_rank(*fits[best], features, rank=rank)
    spread = fitted.up.square().sum().sqrt()  # of latent values with variance 1
    return LowRankMap(fitted.down, fitted.shift, fitted.up * (norm / spread), fitted.offset), best


@torch.no_grad()
def write_projector(linear_1: nn.Linear, linear_2: nn.Linear, wanted: LowRankMap) -> None:
    """Sets the two layers around a GELU to `wanted`, exactly. ValueError if the hidden layer is too narrow.

    Hidden units that are left over keep their weights of the first layer and get none of the second.
    """
    rank, width = len(wanted.down), linear_1.out_features
    if 2 * rank > width:
        raise ValueError(f"a map of rank {rank} needs {2 * rank} hidden units, got {width}; lower the rank")
    linear_1.weight[: 2 * rank] = torch.cat([wanted.down, -wanted.down]).to(linear_1.weight)
    linear_1.bias[: 2 * rank] = torch.cat([wanted.shift, -wanted.shift]).to(linear_1.bias)
    linear_2.weight.zero_()
    linear_2.weight[:, : 2 * rank] = torch.cat([wanted.up, -wanted.up], dim=1).to(linear_2.weight)
    linear_2.bias.copy_(wanted.offset)
