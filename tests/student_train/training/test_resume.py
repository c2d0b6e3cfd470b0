"""A stage that is stopped anywhere resumes, and ends with the weights of one that was not stopped, bit-exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from storage.errors import ConfigError
from student_train.training.metrics_log import MetricsLog
from student_train.training.resume import StageState
from tests.student_train.conftest import MAIN, Runner
from tests.student_train.courses import MEASURED

LOSSES = {"response": {}, "visual": {"weight": 0.5}, "relation": {"weight": 0.5}}
STEPS = 7
# What SIGTERM would do at a given step: a training step is too short to aim at from outside.
STOP_AT = """
import os, signal
from student_train.training import loop as stage_loop
step = stage_loop.run_optimizer_step
def stopping(engine, items, lr, number):
    if number == {step}:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(engine, items, lr, number)
stage_loop.run_optimizer_step = stopping
"""
STOP_ONCE_AT = (
    STOP_AT
    + """
def stopping_once(engine, items, lr, number):
    if number == {step}:
        stage_loop.run_optimizer_step = step
    return stopping(engine, items, lr, number)
stage_loop.run_optimizer_step = stopping_once
"""
)


def weights(runner: Runner, stage: str) -> dict[str, torch.Tensor]:
    return load_file(runner.output(stage) / "model.safetensors")


def curves(output: Path) -> dict[str, list[tuple[int, float]]]:
    """Read TensorBoard's curves, except measured ones such as rates."""
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = sorted(set(events.Tags()["scalars"]) - set(MEASURED))
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def log_of(runner: Runner, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in (runner.output(stage) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, {"zero_stage": 0, "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}),
        pytest.param(
            2,
            {"zero_stage": 2, "ema": 0.9, "checkpoints": {"every": 2, "keep_last": 2, "splits": ["test"]}},
            marks=[pytest.mark.ci, pytest.mark.slow],
        ),
        pytest.param(2, {"zero_stage": 3, "offload": ["optimizer"]}, marks=pytest.mark.slow),
        # DeepSpeed takes another optimizer for these two together.
        pytest.param(2, {"zero_stage": 1, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param(
            2,
            {"zero_stage": 2, "expert_parallel": 2, "moe": {"every": 1}, "losses": {"response": {}, "balance": {}}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_stopped_stage_resumes_bit_exactly(make_runner: Callable[..., Runner], ranks: int, options: dict) -> None:
    stage = {"losses": LOSSES, "steps": STEPS, "micro_batch": 3, "memory_mb": 1, **options}
    runner = make_runner(whole=stage, stopped=stage)
    (whole,) = runner.run_in_turn(("whole",), ranks=ranks)
    assert whole.code == 0, whole.stderr
    (stopped,) = runner.run_in_turn(("stopped",), prologue=STOP_AT.format(step=4), ranks=ranks)
    assert stopped.code == 143, stopped.stderr
    assert "after step 4 of 7" in stopped.stderr
    assert not (runner.output("stopped") / "model.safetensors").exists()
    state = runner.output("stopped") / "state"
    assert len(list(state.rglob("*_expert_*"))) == (4 if "expert_parallel" in options else 0)  # each rank's own ones
    (resumed,) = runner.run_in_turn(("stopped",), ranks=ranks)
    assert resumed.code == 0, resumed.stderr
    assert json.loads((runner.output("stopped") / "summary.json").read_text())["resumed_at"] == 4
    assert not (runner.output("stopped") / "state").exists()
    files = sorted(path.relative_to(runner.output("whole")) for path in runner.output("whole").rglob("*.safetensors"))
    for file in files:
        expected, found = (load_file(runner.output(stage) / file) for stage in ("whole", "stopped"))
        assert expected.keys() == found.keys()
        for name, weight in found.items():
            assert torch.equal(weight, expected[name]), (file, name)
    assert log_of(runner, "stopped") == log_of(runner, "whole")
    assert curves(runner.output("stopped")) == curves(runner.output("whole"))
    if "checkpoints" in options:
        assert {str(file.parent) for file in files} == {
            ".", "checkpoints/best", "checkpoints/step-00000004", "checkpoints/step-00000006"
        }  # fmt: skip


@pytest.mark.slow
@pytest.mark.ci
def test_a_killed_stage_resumes_from_its_last_saved_state(make_runner: Callable[..., Runner]) -> None:
    stage = {"losses": LOSSES, "steps": 400, "save_every": 5, "zero_stage": 0}
    runner = make_runner(whole={**stage, "steps": 400}, killed=stage)
    runner.config.write_text(yaml.safe_dump(runner.document))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(MAIN), str(runner.config), "--stage", "killed"]
    process = subprocess.Popen(command, env=environment, cwd=runner.folder, stderr=subprocess.DEVNULL)
    state = runner.output("killed") / "state"
    deadline = time.monotonic() + 240
    while not any(state.glob("step-*")):
        assert time.monotonic() < deadline, "no state was saved"
        assert process.poll() is None, "the stage ended by itself"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    outcomes = runner.run_in_turn(("killed",), ("whole",))
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.stderr for outcome in outcomes]
    assert json.loads((runner.output("killed") / "summary.json").read_text())["resumed_at"] >= 5
    expected = weights(runner, "whole")
    for name, weight in weights(runner, "killed").items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.ci
@pytest.mark.slow
def test_a_state_of_other_settings_or_ranks_is_refused(make_runner: Callable[..., Runner]) -> None:
    stage = {"steps": STEPS, "zero_stage": 2}
    runner = make_runner(first=stage)
    (stopped,) = runner.run_in_turn(("first",), prologue=STOP_AT.format(step=2))
    assert stopped.code == 143, stopped.stderr
    (two,) = runner.run_in_turn(("first",), ranks=2)
    assert two.code == 2
    assert "is the state of 1 ranks, but this run has 2" in two.stderr
    changed = ("first", "stages.first.lr=0.001")
    other, anew = runner.run_in_turn(changed, (*changed, "--restart"))
    assert other.code == 2
    assert "step-00000002: stage first stopped here after step 2 with other inputs" in other.stderr
    assert "stages.first.lr: was 0.002, is 0.001" in other.stderr
    assert "--restart" in other.stderr
    assert "undo" in other.stderr
    assert anew.code == 0, anew.stderr
    assert json.loads((runner.output("first") / "summary.json").read_text())["resumed_at"] == 0


def test_a_refused_state_resumes_when_the_change_is_undone(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(first={"steps": STEPS})
    commands = ("first",), ("first", "stages.first.weight_decay=0.1"), ("first", "stages.first.log_every=3")
    stopped, other, undone = runner.run_in_turn(*commands, prologue=STOP_ONCE_AT.format(step=2))
    assert [stopped.code, other.code, undone.code] == [143, 2, 0], [stopped.stderr, other.stderr, undone.stderr]
    assert "stages.first.weight_decay: was 0.0, is 0.1" in other.stderr
    assert json.loads((runner.output("first") / "summary.json").read_text())["resumed_at"] == 2


def test_a_state_of_an_earlier_version_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "step-00000004"
    folder.mkdir(parents=True)
    marker = {"step": 4, "fingerprint": "0" * 64, "num_ranks": 1, "notes": {}}
    (folder / "state.json").write_text(json.dumps(marker))
    with pytest.raises(ConfigError, match=r"step-00000004: this state has no inputs, .* --restart"):
        StageState.of(tmp_path, "first", {}, num_ranks=1).find_newest()
    assert (folder / "state.json").is_file()


@pytest.mark.ci
@pytest.mark.slow
def test_a_state_of_other_initial_weights_is_refused(
    make_runner: Callable[..., Runner], checkpoint: Path, tmp_path: Path
) -> None:
    init = tmp_path / "init"
    shutil.copytree(checkpoint, init)
    runner = make_runner(first={"init": str(init), "steps": STEPS, "train": ["projector"]})
    (stopped,) = runner.run_in_turn(("first",), prologue=STOP_AT.format(step=2))
    assert stopped.code == 143, stopped.stderr
    weights = load_file(init / "model.safetensors")
    name = next(name for name in weights if name.endswith("lm_head.weight"))  # frozen, so no state holds it
    save_file({**weights, name: weights[name] * 1.01}, init / "model.safetensors", metadata={"format": "pt"})
    (other,) = runner.run_in_turn(("first",))
    assert other.code == 2
    assert "init.weights: was " in other.stderr
    assert (runner.output("first") / "state" / "step-00000002" / "state.json").is_file()


@pytest.mark.ci
@pytest.mark.slow
def test_a_changed_criterion_resets_the_best_checkpoint(make_runner: Callable[..., Runner]) -> None:
    checkpoints = {"every": 2, "splits": ["test"], "metric": "response"}
    runner = make_runner(first={"losses": {"response": {}}, "steps": STEPS, "checkpoints": checkpoints})
    (stopped,) = runner.run_in_turn(("first",), prologue=STOP_AT.format(step=4))
    assert stopped.code == 143, stopped.stderr
    (resumed,) = runner.run_in_turn(("first", "stages.first.checkpoints.metric=cross_entropy"))
    assert resumed.code == 0, resumed.stderr
    summary = json.loads((runner.output("first") / "summary.json").read_text())
    lines = [line for line in log_of(runner, "first") if line["step"] > 4 and "held_out_cross_entropy" in line]
    best = min(lines, key=lambda line: line["held_out_cross_entropy"])
    expected = {"step": best["step"], "metric": "cross_entropy", "value": best["held_out_cross_entropy"]}
    assert (summary["resumed_at"], summary["best"]) == (4, expected)


def test_a_resumed_log_keeps_only_the_lines_of_finished_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    with MetricsLog(path, resumed_at=2) as log:
        log.write({"step": 3, "again": True})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
    with MetricsLog(path):
        pass
    assert path.read_text() == ""
