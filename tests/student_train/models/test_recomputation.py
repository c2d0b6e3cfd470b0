from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from storage.errors import ConfigError
from student_train.config import Module
from student_train.models.loading import freeze, load_student, read_checkpoint
from student_train.models.recomputation import enable_gradient_checkpointing

ROWS, TOKENS = 2, 9


def gradients(model: Any, *, checkpointing: bool, trained: tuple[Module, ...]) -> tuple[list[Tensor], Counter[str]]:
    """Return the trained parameters' gradients, and the number of calls of each decoder layer's attention."""
    freeze(model, trained)
    if checkpointing:
        enable_gradient_checkpointing(model)
    calls: Counter[str] = Counter()
    layers = model.model.language_model.layers
    handles = [
        layer.self_attn.register_forward_pre_hook(lambda *_, number=number: calls.update([str(number)]))
        for number, layer in enumerate(layers)
    ]
    draw = torch.Generator().manual_seed(0)
    width = model.config.vision_config.hidden_size
    features = torch.randn(ROWS, TOKENS, width, generator=draw)
    embedded = model.model.multi_modal_projector(features)
    model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state.square().mean().backward()
    for handle in handles:
        handle.remove()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], calls


@pytest.mark.parametrize("trained", [("projector",), ("projector", "llm"), ("projector", "mlp")])
def test_layers_are_recomputed_whether_they_train_or_not(checkpoint: Path, trained: tuple[Module, ...]) -> None:
    results = {}
    for checkpointing in (False, True):
        model = load_student(read_checkpoint(checkpoint), precision="fp32", device=torch.device("cpu"))
        results[checkpointing] = gradients(model, checkpointing=checkpointing, trained=trained)
        num_layers = len(model.model.language_model.layers)
        assert results[checkpointing][1] == {str(number): 1 + checkpointing for number in range(num_layers)}
    assert len(results[True][0]) == len(results[False][0]) > 0
    for ours, plain in zip(results[True][0], results[False][0], strict=True):
        assert torch.equal(ours, plain)


def test_dropout_of_frozen_layers_stays_off(checkpoint: Path) -> None:
    model = load_student(read_checkpoint(checkpoint), precision="fp32", device=torch.device("cpu"))
    freeze(model, ("projector",))
    enable_gradient_checkpointing(model)
    for layer in model.model.language_model.layers:
        assert layer.training
        assert not any(module.training for name, module in layer.named_modules() if name)


def test_a_frozen_layer_with_dropout_of_its_own_is_refused(checkpoint: Path) -> None:
    model = load_student(read_checkpoint(checkpoint), precision="fp32", device=torch.device("cpu"))
    freeze(model, ("projector",))
    model.model.language_model.layers[0].hidden_dropout = 0.1
    with pytest.raises(ConfigError, match=r"layers\.0 has \{'hidden_dropout': 0\.1\}"):
        enable_gradient_checkpointing(model)
