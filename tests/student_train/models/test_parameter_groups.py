from __future__ import annotations

from pathlib import Path

import pytest
import torch

from student_train.config import Module
from student_train.models.loading import freeze, load_student, read_checkpoint
from student_train.models.parameter_groups import make_parameter_groups


def test_each_trained_parameter_is_in_the_group_of_its_module(checkpoint: Path) -> None:
    model = load_student(read_checkpoint(checkpoint), precision="fp32", device=torch.device("cpu"))
    freeze(model, ("projector", "llm"))
    rates: dict[Module, float] = {"projector": 2e-4, "mlp": 1e-5}
    groups = make_parameter_groups(model, lr=2e-5, module_lr=rates, weight_decay=0.1)
    of_parameter = {id(p): group for group in groups for p in group.parameters}
    assert sum(len(group.parameters) for group in groups) == len(of_parameter)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in trained.values()} == of_parameter.keys()
    for name, parameter in trained.items():
        factor = 10 if "multi_modal_projector" in name else 0.5 if ".mlp." in name else 1
        group = of_parameter[id(parameter)]
        assert group.lr_factor == pytest.approx(factor), name
        assert group.weight_decay == (0.1 if parameter.ndim > 1 else 0), name
    assert sorted({group.lr_factor for group in groups}) == pytest.approx([0.5, 1, 10])
