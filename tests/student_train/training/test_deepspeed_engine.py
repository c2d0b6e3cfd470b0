"""Each DeepSpeed option takes effect and trains the same as the plain run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from student_train.models.checkpoint import to_legacy_name
from student_train.models.loading import load_student, read_checkpoint
from tests.student_train.conftest import Outcome, Runner
from tests.student_train.courses import assert_same_course, metrics

LOSSES = {"response": {}, "visual": {"weight": 0.5}}
SMALL = {"cross_entropy": 1e-3}  # gradients of 1e-1, which 2^16 times are still numbers of fp16
Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(make_runner: Callable[..., Runner]) -> Trained:
    """Return the output folder of a stage; all stages ran in one process."""
    common = {"losses": LOSSES, "micro_batch": 6}
    stages = {
        "plain": {"zero_stage": 0},
        "offloaded": {"zero_stage": 2, "offload": ["optimizer"]},
        "all_offloaded": {"zero_stage": 3, "offload": ["optimizer", "parameters"]},
        "small": {"losses": SMALL},
        "fp16": {"losses": SMALL, "precision": "fp16", "zero_stage": 2},
        "fp16_shared": {"losses": SMALL, "precision": "fp16", "zero_stage": 3, "offload": ["optimizer"]},
        "overflowing": {"precision": "fp16", "zero_stage": 1, "steps": 16},
        "frozen_llm": {"module_lr": {"llm": 1e-30}, "zero_stage": 1},
        "own_rate": {"lr": 1.0, "module_lr": {"llm": 2e-3, "projector": 2e-3}, "zero_stage": 3},
    }
    runner = make_runner(**{name: {**common, **fields} for name, fields in stages.items()})
    outcomes: dict[str, Outcome] = dict(zip(stages, runner.run_in_turn(*((name,) for name in stages)), strict=True))

    def output(stage: str) -> Path:
        assert outcomes[stage].code == 0, outcomes[stage].stderr
        return runner.output(stage)

    return output


@pytest.mark.parametrize("stage", ["offloaded", "all_offloaded"])
def test_offloading_does_not_change_the_result(trained: Trained, stage: str) -> None:
    assert_same_course(trained(stage), trained("plain"))


@pytest.mark.parametrize("stage", ["fp16", "fp16_shared"])
def test_fp16_follows_fp32(trained: Trained, stage: str) -> None:
    for low, full in zip(metrics(trained(stage)), metrics(trained("small")), strict=True):
        assert low["loss"] == pytest.approx(full["loss"], rel=0.02)
        assert low["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.05)
        assert low["loss_scale"] == 2**16
    assert {tensor.dtype for tensor in load_file(trained(stage) / "model.safetensors").values()} == {torch.float16}


def test_a_step_that_overflows_is_skipped_and_does_not_count_as_divergence(trained: Trained) -> None:
    lines = metrics(trained("overflowing"))
    skipped = [line for line in lines if line["grad_norm"] is None]
    assert 0 < len(skipped) < len(lines)
    assert all(after["loss_scale"] <= line["loss_scale"] for line, after in itertools.pairwise(lines))
    assert lines[-1]["grad_norm"] is not None
    assert lines[-1]["loss_scale"] < 2**16
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_module_s_own_learning_rate_changes_no_other_module(trained: Trained, checkpoint: Path) -> None:
    model = load_student(read_checkpoint(checkpoint), precision="fp32", device=torch.device("cpu"))
    before = {to_legacy_name(name): tensor for name, tensor in model.state_dict().items()}
    after = load_file(trained("frozen_llm") / "model.safetensors")
    changed = {name.split(".")[0] for name, tensor in after.items() if (tensor - before[name]).abs().max() > 1e-20}
    assert changed == {"multi_modal_projector"}


def test_all_modules_take_the_stage_s_learning_rate(trained: Trained) -> None:
    assert_same_course(trained("own_rate"), trained("plain"), without=("lr",))
