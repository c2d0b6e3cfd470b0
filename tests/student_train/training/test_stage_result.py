"""A finished stage is kept, refused or retrained as requested; the old result is kept until the new one exists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.backends.lock import HeldError
from storage.errors import ConfigError
from student_train.config import StageSection
from student_train.training.stage_inputs import write_record
from student_train.training.stage_request import StageRequest
from student_train.training.stage_result import StageDecision, decide_stage, finish_swap, install_result, lock_stage
from tests.student_train.conftest import Runner

INPUTS: dict[str, Any] = {
    "stage": StageSection.model_construct().model_dump(mode="json") | {"lr": 0.1},
    "products": {},
    "init": {"weights": "a" * 64},
    "caches": [{"weight": 1.0, "samples": "b" * 64}],
}
OTHER = {**INPUTS, "stage": {**INPUTS["stage"], "lr": 0.2}}
# After each command: which summary.json is there.
REMEMBER = """
import student_train.command
from pathlib import Path
train_once = student_train.command.main
results = []
def remembering(*arguments, **options):
    code = train_once(*arguments, **options)
    results.append(Path("runs/t/first-0/summary.json").read_text())
    Path("results.json").write_text(json.dumps(results))
    return code
student_train.command.main = remembering
"""
PLAIN, ALWAYS, IF_CHANGED = StageRequest(), StageRequest("always"), StageRequest("if_changed")


def finish(folder: Path, inputs: dict[str, Any] = INPUTS) -> None:
    folder.mkdir()
    for name in ("config.json", "summary.json"):
        (folder / name).write_text("{}")
    write_record(folder, inputs)


def save_state(folder: Path, inputs: dict[str, Any] = INPUTS) -> Path:
    state = folder / "state" / "step-00000003"
    state.mkdir(parents=True)
    (state / "state.json").write_text(json.dumps({"step": 3, "num_ranks": 1, "notes": {}, "inputs": inputs}))
    return state


def work(output: Path, inputs: dict[str, Any] = INPUTS, request: StageRequest = PLAIN) -> StageDecision:
    return decide_stage(stage(output), "kd", inputs, request, num_ranks=1)


def stage(output: Path) -> StageSection:
    return StageSection(init="x", output=str(output), steps=1)


def test_a_finished_stage_is_kept_refused_or_retrained_beside_its_result(tmp_path: Path) -> None:
    output, again = tmp_path / "kd", tmp_path / "kd~again"
    assert work(output) == StageDecision(output, trains=True)
    finish(output)
    assert work(output) == work(output, request=IF_CHANGED) == StageDecision(output, trains=False)
    assert work(output, request=ALWAYS) == StageDecision(again, trains=True)
    assert work(output, OTHER, IF_CHANGED) == StageDecision(again, trains=True)
    with pytest.raises(ConfigError, match=r"(?s)kd is finished, but .*--again.*stages\.kd\.lr: was 0\.1, is 0\.2"):
        work(output, OTHER)
    (output / "inputs.json").unlink()  # as an earlier version left it
    with pytest.raises(ConfigError, match="holds a finished result of unknown inputs"):
        work(output)
    assert work(output, request=IF_CHANGED) == StageDecision(again, trains=True)


def test_a_field_that_an_earlier_version_lacked_counts_as_its_default(tmp_path: Path) -> None:
    old = {**INPUTS, "stage": {name: value for name, value in INPUTS["stage"].items() if name != "clip_norm"}}
    finish(tmp_path / "kd", old)
    assert not work(tmp_path / "kd").trains


def test_only_restart_discards_a_state(tmp_path: Path) -> None:
    output, again = tmp_path / "kd", tmp_path / "kd~again"
    state = save_state(output)
    assert work(output).trains
    for request in (PLAIN, IF_CHANGED, ALWAYS):
        with pytest.raises(ConfigError, match=r"(?s)after step 3.*undo.*--restart.*stages\.kd\.lr: was 0\.1, is 0\.2"):
            work(output, OTHER, request)
    assert state.is_dir()
    assert work(output, OTHER, StageRequest(restart=True)) == StageDecision(output, trains=True)
    assert not state.exists()
    finish_folder = tmp_path / "other"
    output.rename(finish_folder)
    finish(output)
    state = save_state(again, OTHER)
    assert not work(output).trains  # the finished one has not changed
    with pytest.raises(ConfigError, match="undo"):
        work(output, request=ALWAYS)
    assert work(output, OTHER, IF_CHANGED) == StageDecision(again, trains=True)
    assert state.is_dir()
    assert work(output, request=StageRequest("always", restart=True)) == StageDecision(again, trains=True)
    assert not state.exists()
    assert (output / "summary.json").is_file()


def test_a_swap_that_a_kill_interrupted_is_completed(tmp_path: Path) -> None:
    output, again, before = (tmp_path / name for name in ("kd", "kd~again", "kd~before"))

    def inputs_of(folder: Path) -> float:
        return json.loads((folder / "inputs.json").read_text())["stage"]["lr"]

    for moment in range(4):
        for folder in (output, again, before):
            shutil.rmtree(folder, ignore_errors=True)
        finish(output)
        finish(again, OTHER)
        if moment >= 1:
            output.rename(before)
        if moment >= 2:
            again.rename(output)
        if moment == 3:
            (before / "summary.json").unlink()  # half deleted
        assert work(output, OTHER) == StageDecision(output, trains=False)
        assert inputs_of(output) == 0.2
        assert {item.name for item in tmp_path.iterdir()} == {"kd"}
    shutil.rmtree(output)
    finish(before)  # the new one is not whole, as when somebody deleted it
    finish_swap(output)
    assert inputs_of(output) == 0.1


def test_a_finished_retraining_that_was_not_installed_is_not_repeated(tmp_path: Path) -> None:
    output, again = tmp_path / "kd", tmp_path / "kd~again"
    finish(output)
    finish(again)
    done = work(output, request=ALWAYS)
    assert done == StageDecision(again, trains=False)
    install_result(done, stage(output))
    assert not again.exists()


def test_a_finished_stage_is_reported_and_again_replaces_it(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(first={"steps": 2, "zero_stage": 0})
    output = runner.output("first")
    changed = ("first", "stages.first.lr=0.001")
    diverging = ("first", "stages.first.lr=1e30", "stages.first.clip_norm=1e30", "--again")
    commands = ("first",), ("first",), changed, diverging, (*changed, "--again"), (*changed, "--again-if-changed")
    outcomes = runner.run_in_turn(*commands, prologue=REMEMBER)
    assert [outcome.code for outcome in outcomes] == [0, 0, 2, 1, 0, 0], [outcome.stderr for outcome in outcomes]
    assert "stages.first.lr: was 0.002, is 0.001" in outcomes[2].stderr
    results = json.loads((runner.folder / "results.json").read_text())
    assert len(set(results[:4])) == 1  # the first result, whatever was refused or failed
    assert len(set(results[4:])) == 1
    assert results[3] != results[4]
    assert not list(output.parent.glob("first-0~*"))


def test_a_stage_s_output_has_one_command_at_a_time(tmp_path: Path) -> None:
    one = stage(tmp_path / "kd")
    with (
        lock_stage(one, "kd"),
        pytest.raises(HeldError, match=r"^stages\.kd\.output, .*kd, is in use by .*process"),
        lock_stage(one, "kd", patience_s=0),
    ):
        pass


def test_all_ranks_take_the_first_rank_s_decision(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(first={"steps": 2, "zero_stage": 0})
    commands = ("first",), ("first",), ("first", "stages.first.lr=0.001"), ("first", "stages.first.lr=0.001", "--again")
    codes = [outcome.code for outcome in runner.run_in_turn(*commands, ranks=2)]
    assert codes == [0, 0, 2, 0]
