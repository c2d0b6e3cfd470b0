"""Measures how much each layer of a decoder changes the hidden state, on some samples that a stage trains on.

The measure is ShortGPT's block influence (Men et al. 2024): 1 - cos(input, output) of a layer, the mean over tokens.

Legend: b sequences, t tokens, d hidden.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.errors import StillhouseError
from storage.reader.cache import read_identity
from student_train.config import PruneSection, StageSection
from student_train.data.collate import collate
from student_train.data.mixture import Mixture
from student_train.data.sample_images import TensorStore, VisionGatherer
from student_train.losses.config import LossesSection
from student_train.models.loading import check_fit, read_checkpoint
from student_train.models.student import Student
from student_train.training.stage_data import open_mixture
from student_train.training.stage_inputs import describe_samples

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerChange:
    """The change of each layer of the model that a stage prunes, on evenly spaced samples of the stage."""

    stage: StageSection
    section: PruneSection
    cache_path: str

    def describe(self) -> dict[str, Any]:
        """Describe the samples by their caches and places."""
        data, chosen = self._open_samples()
        return {
            "num_samples": len(chosen),
            "places": hashlib.sha256(np.ascontiguousarray(chosen).tobytes()).hexdigest(),
            "caches": [
                describe_samples(source, section)
                for source, section in zip(data.sources, self.stage.list_sources(self.cache_path), strict=True)
            ],
        }

    @torch.inference_mode()
    def measure(self, model: Any, layers: Sequence[nn.Module]) -> list[float]:
        """Return each layer's mean change over all tokens, images included. Errors: those of `open_mixture`,
        IdentityError for a model that does not fit the caches."""
        checkpoint = read_checkpoint(self.section.model)
        for source in self.stage.list_sources(self.cache_path):
            check_fit(checkpoint, read_identity(source.path))
        data, chosen = self._open_samples()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        home = model.device
        student = Student(
            model.to(device),
            vocab_size=data.identity.vocab_size,
            image_token_id=checkpoint.sequence_format.image_token_id,
            features=None,
        )
        vision = VisionGatherer(data.images(checkpoint.image_processor), features=None, pixels=TensorStore(0))
        meter = _Meter(len(layers))
        with ExitStack() as stack:
            for number, layer in enumerate(layers):
                stack.enter_context(meter.watch(number, layer))
            for start in range(0, len(chosen), self.stage.micro_batch):
                samples = data.read_many(chosen[start : start + self.stage.micro_batch])
                batch = collate(samples, checkpoint.sequence_format, vision.gather).to(device)
                meter.is_token = batch.is_token
                student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
        model.to(home)
        changes = [total / meter.num_tokens for total in meter.totals]
        if not all(map(math.isfinite, changes)):
            raise StillhouseError(
                f"{self.section.model}: the changes of its layers are {changes}, expected finite numbers; prune with "
                "choose: spaced, or give a bfloat16 or float32 model"
            )
        listed = ", ".join(f"{number}: {change:.3g}" for number, change in enumerate(changes))
        _log.warning("change of the hidden state by layer, on %d samples: %s", len(chosen), listed)
        return changes

    def _open_samples(self) -> tuple[Mixture, NDArray[np.int64]]:
        data = open_mixture(self.stage.model_copy(update={"losses": LossesSection()}), self.cache_path)
        count = min(self.section.slice, len(data.indices))
        return data, data.indices[np.linspace(0, len(data.indices) - 1, count).round().astype(np.int64)]


class _Meter:
    """Adds up 1 - cos(input, output) of layers over the tokens that are no padding."""

    def __init__(self, num_layers: int) -> None:
        self.totals = [0.0] * num_layers
        self.num_tokens = 0
        self.is_token: Bool[Tensor, "b t"] | None = None

    def watch(self, number: int, layer: nn.Module) -> Any:
        """Measure a layer in every forward pass; return the hook's handle, a context manager."""

        def add(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
            before = named["hidden_states"] if "hidden_states" in named else given[0]
            self._add(number, before, made if isinstance(made, Tensor) else made[0])

        return layer.register_forward_hook(add, with_kwargs=True)

    def _add(self, number: int, before: Float[Tensor, "c t d"], after: Float[Tensor, "c t d"]) -> None:
        assert self.is_token is not None
        rows, length = self.is_token.shape  # a blank image may have been appended as one more sequence
        before, after = (states[:rows, :length][self.is_token].float() for states in (before, after))
        self.totals[number] += float((1 - torch.cosine_similarity(before, after, dim=-1)).sum())
        if number == 0:
            self.num_tokens += len(before)
