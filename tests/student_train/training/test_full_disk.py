"""A disk that fills up while a stage trains: one message, a complete last state, the same command resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from storage.backends.folder import write_json
from storage.errors import WriteError
from student_train.models.checkpoint import save_checkpoint
from student_train.models.loading import load_student, read_checkpoint
from student_train.training.metrics_log import MetricsLog
from student_train.training.trackers import Trackers
from tests.small_disk import SmallDisk, small_disk
from tests.student_train.conftest import ROOT, Runner

STATE_BYTES = 1_900_000  # of the tiny checkpoint, with the average: 1,852 KiB on a tmpfs


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 8 << 20) as found:
        yield found


def test_weights_that_do_not_fit_on_the_disk_leave_the_old_ones(disk: SmallDisk, checkpoint: Path) -> None:
    model: Any = load_student(read_checkpoint(checkpoint), precision="fp32", device=torch.device("cpu"))
    folder = save_checkpoint(model, disk.folder / "out", checkpoint)
    old = (folder / "model.safetensors").read_bytes()
    for free in (0, 20_000, len(old) // 2, len(old)):  # in the folder, the config, the weights, what comes after them
        disk.fill(free_bytes=free)
        with pytest.raises(WriteError, match=r"out: cannot be written: .*are needed\); free space there"):
            save_checkpoint(model, folder, checkpoint)
        assert (folder / "model.safetensors").read_bytes() == old
        assert {path.name for path in disk.folder.iterdir()} == {"out", "ballast"}
    disk.make_room()
    save_checkpoint(model, folder, checkpoint)


def test_a_log_on_a_full_disk_ends_with_a_whole_line(disk: SmallDisk) -> None:
    path = disk.folder / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "text": "x" * 4000})
        disk.fill()
        with pytest.raises(WriteError, match=r"metrics\.jsonl: cannot be written: No space left"):
            log.write({"step": 2, "text": "x" * 4000})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    with pytest.raises(WriteError, match=r"metrics\.jsonl: cannot be written"):
        MetricsLog(path, resumed_at=1)  # which writes it anew
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    disk.make_room()
    with MetricsLog(path, resumed_at=1) as log:
        log.write({"step": 2})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_full_disk_leaves_a_document_unchanged(disk: SmallDisk) -> None:
    path = disk.folder / "evaluation.json"
    write_json(path, {"a": 1})
    disk.fill()
    with pytest.raises(WriteError, match=r"evaluation\.json: cannot be written: No space left on device"):
        write_json(path, {"a": "x" * 10_000})
    assert json.loads(path.read_text()) == {"a": 1}


def test_tensorboard_on_a_full_disk_gives_one_message(disk: SmallDisk) -> None:
    disk.fill(free_bytes=8192)

    def write() -> None:
        with Trackers(["tensorboard"], disk.folder, title="t", settings={}) as tracking:
            for step in range(20_000):
                tracking.write({"step": step, "loss": 1.0})

    with pytest.raises(WriteError, match=r"tensorboard: cannot be written: .*free space there"):
        write()


FILLING = """
import json, os
from pathlib import Path
from student_train import command
from student_train.training import loop as stage_loop
disk, plan = Path({disk!r}), iter({plan!r})
ballast, step, train, now = disk / "ballast", stage_loop.run_optimizer_step, command.train, {{}}
def training(*arguments, **options):
    ballast.unlink(missing_ok=True)
    now["at"], now["free"] = next(plan)
    try:
        train(*arguments, **options)
    finally:
        names = sorted(str(path.relative_to(disk)) for path in disk.glob("*/state/*step-*"))
        with open({log!r}, "a") as log:
            log.write(json.dumps(names) + "\\n")
def filling(engine, items, lr, number):
    if number == now["at"] and os.environ.get("RANK", "0") == "0":
        found = os.statvfs(disk)
        ballast.write_bytes(bytes(max(0, found.f_bavail * found.f_frsize - now["free"])))
    return step(engine, items, lr, number)
command.train, stage_loop.run_optimizer_step = training, filling
"""  # fills the disk before given steps of given commands


def test_a_stage_resumes_after_a_full_disk(make_runner: Callable[..., Runner], disk: SmallDisk, tmp_path: Path) -> None:
    common = {"steps": 4, "ema": 0.9, "track": ["tensorboard"], "save_every": 1}
    output = disk.folder / "kd-0"
    runner = make_runner(whole=common, kd={**common, "output": str(output)})
    fills = [(0, 0), (2, STATE_BYTES // 2), (3, 0), (4, 300_000), (0, 0)]  # a state, everything, the weights at the end
    log = tmp_path / "states.jsonl"
    prologue = FILLING.format(disk=str(disk.folder), plan=fills, log=str(log))
    whole, *failed, last = runner.run_in_turn(("whole",), *[("kd",)] * 4, prologue=prologue)
    assert whole.code == 0, whole.stderr
    for outcome in failed:
        assert outcome.code == 1
        sentences = [line for line in outcome.stderr.splitlines() if "error: " in line]
        assert len(sentences) == 1
        assert str(output) in sentences[0]
        assert "cannot be written: " in sentences[0]
        assert sentences[0].endswith("free space there, and run the same command again")
        assert "Traceback" not in outcome.stderr
    states = [json.loads(line) for line in log.read_text().splitlines()]
    assert states == [[], *([f"kd-0/state/step-{step:08d}"] for step in (1, 2, 3)), []]  # no half of a newer one
    assert last.code == 0, last.stderr
    assert json.loads((output / "summary.json").read_text())["resumed_at"] == 3
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (output, runner.output("whole")))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_all_ranks_end_when_one_finds_the_disk_full(
    make_runner: Callable[..., Runner], disk: SmallDisk, tmp_path: Path
) -> None:
    common = {"steps": 4, "save_every": 1, "output": str(disk.folder / "kd-0"), "zero_stage": 2}
    runner = make_runner(kd=common)
    prologue = FILLING.format(disk=str(disk.folder), plan=[(3, 300_000)], log=str(tmp_path / "log"))
    script = tmp_path / "main.py"
    script.write_text(
        f"import sys, time; sys.path[0] = {str(ROOT)!r}\n{prologue}\n"
        "sys.exit(command.main(sys.argv[1:], started=time.monotonic()))\n"
    )
    runner.config.write_text(yaml.safe_dump(runner.document))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*command, str(runner.config), "--stage", "kd"], cwd=runner.folder, capture_output=True, text=True,
        timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be written: " in done.stderr
    assert [path.name for path in (disk.folder / "kd-0" / "state").glob("*step-*")] == ["step-00000002"]


def test_a_disk_that_is_too_small_from_the_start_is_refused_before_training(
    make_runner: Callable[..., Runner], disk: SmallDisk
) -> None:
    disk.fill(free_bytes=500_000)
    outcome = make_runner(kd={"output": str(disk.folder / "kd-0")}).run("kd")
    assert outcome.code == 2
    assert "the checkpoint at the end of the stage needs " in outcome.stderr
    assert "free space there, or give another output" in outcome.stderr
