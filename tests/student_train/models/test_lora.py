from __future__ import annotations

from pathlib import Path

import pytest
import torch

from storage.errors import ConfigError
from student_train.config import LoraSection
from student_train.models.loading import freeze, load_student, read_checkpoint
from student_train.models.lora import add_adapters, merge_adapters
from student_train.models.sparse_upcycling import ExpertSettings, upcycle

CPU = torch.device("cpu")


def test_adapters_begin_without_effect_and_merge_by_their_formula(checkpoint: Path) -> None:
    model = load_student(read_checkpoint(checkpoint), precision="fp32", device=CPU)
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    freeze(model, ("projector",))
    section = LoraSection(rank=2, alpha=3.0, modules=("q_proj", "down_proj"))
    add_adapters(model, section)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "multi_modal_projector" in name for name in trained)
    assert sum("lora_" in name for name in trained) == 4  # A and B of two modules in one layer
    assert merge_adapters(model.state_dict(), section).keys() == plain.keys()
    assert all(torch.equal(weight, plain[name]) for name, weight in merge_adapters(model.state_dict(), section).items())
    layer = model.model.language_model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    found = merge_adapters(model.state_dict(), section)
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(found[name] - plain[name], layer.get_delta_weight("default"))
    assert {other for other in plain if not torch.equal(found[other], plain[other])} == {name}


def test_missing_modules_are_refused_by_name(checkpoint: Path) -> None:
    model = load_student(read_checkpoint(checkpoint), precision="fp32", device=CPU)
    with pytest.raises(ConfigError, match=r"the decoder has no qproj; its linear layers are down_proj, .*q_proj"):
        add_adapters(model, LoraSection(modules=("qproj", "v_proj")))


def test_a_sparse_decoder_is_refused(checkpoint: Path) -> None:
    model = load_student(read_checkpoint(checkpoint), precision="fp32", device=CPU)
    sparse = upcycle(model, ExpertSettings(num_experts=2, top_k=1, every=1), seed=0)
    with pytest.raises(ConfigError, match="mixture of experts; remove lora"):
        add_adapters(sparse, LoraSection())
