"""The exponential moving average of trained weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from storage.errors import StillhouseError


class WeightAverage:
    """Averages a model's trained parameters in float32, identically on every rank.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the initial weights lose their influence quickly.
    Source: TensorFlow's ExponentialMovingAverage with num_updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the model's current parameters, which must be whole, not sharded by ZeRO-3."""
        self._decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().float().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after a step, counted from 1."""
        kept = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._trained.items():
            self._average[name].lerp_(parameter.float(), 1 - kept)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights, within the context; then restore its own bit-exactly."""
        own = {name: p.detach().clone() for name, p in self._trained.items()}
        self._copy_to_model(self._average)
        try:
            yield
        finally:
            self._copy_to_model(own)

    @torch.no_grad()
    def _copy_to_model(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(weights[name])

    def save(self, path: Path) -> None:
        """Write the averages to a new file."""
        from safetensors.torch import save_file

        save_file(self._average, path)

    def load(self, path: Path) -> None:
        """Restore averages that `save` wrote. StillhouseError: a broken file."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
            for name, average in self._average.items():
                average.copy_(found[name])
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise StillhouseError(
                f"{path}: cannot be read back: {error}; repair the disk, or discard the state with --restart"
            ) from error
