from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from storage.errors import StillhouseError
from student_train.training.ema import WeightAverage


def make_model(value: float) -> nn.Linear:
    model = nn.Linear(1, 1).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(value)
        model.bias.fill_(7.0).requires_grad_(False)
    return model


def test_an_average_by_hand(tmp_path: Path) -> None:
    model = make_model(0.0)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(11.0)
    average.update(1)  # keeps 2 / 11 of itself
    with average.swapped_in():
        assert model.weight.item() == pytest.approx(9.0)
        assert model.bias.item() == 7.0
    assert model.weight.item() == 11.0
    average.update(1000)  # keeps its decay, 0.5
    with average.swapped_in():
        assert model.weight.item() == pytest.approx(10.0)
    average.save(tmp_path / "average.safetensors")
    other = make_model(0.0)
    restored = WeightAverage(other, 0.5)
    restored.load(tmp_path / "average.safetensors")
    with restored.swapped_in():
        assert other.weight.item() == pytest.approx(10.0)


def test_a_model_gets_its_own_weights_back_after_an_error() -> None:
    model = make_model(3.0)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(4.0)
    with pytest.raises(RuntimeError, match="disk is full"), average.swapped_in():
        raise RuntimeError("disk is full")
    assert model.weight.item() == 4.0


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "average.safetensors"
    path.write_bytes(b"torn")
    with pytest.raises(StillhouseError, match=r"average\.safetensors: cannot be read back"):
        WeightAverage(make_model(0.0), 0.5).load(path)
