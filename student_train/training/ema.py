"""The exponential moving average of the weights that train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from storage.errors import StillhouseError


class WeightAverage:
    """Averages of a model's trained parameters, in float32, the same on every rank.

    After step t an average keeps min(decay, (1 + t) / (10 + t)) of itself, so that the weights before any training
    are soon forgotten. Source: TensorFlow's ExponentialMovingAverage with num_updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Of the model as it is: whole parameters, not ZeRO-3's pieces."""
        self._decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().float().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step of that number, counted from 1."""
        kept = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._trained.items():
            self._average[name].lerp_(parameter.float(), 1 - kept)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averaged weights; afterwards its own, to the bit."""
        own = {name: p.detach().clone() for name, p in self._trained.items()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(weights[name])

    def save(self, path: Path) -> None:
        """Write the averages to a new file."""
        from safetensors.torch import save_file

        save_file(self._average, path)

    def load(self, path: Path) -> None:
        """Go on where `save` was called. StillhouseError if the file is not whole."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
            for name, average in self._average.items():
                average.copy_(found[name])
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise StillhouseError(
                f"{path}: cannot be read back: {error}; mend the disk, or give the state up with --restart"
            ) from error
