"""Run by test_placement in a process of its own: commands in a Ray that is told it has four GPUs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray

from teacher_dump.ray_jobs import Command, run_commands
from teacher_dump.ray_jobs.cluster import Resources, describe_lacking_room
from teacher_dump.ray_jobs.commands import WaitingCommands

SHOW = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"


def main(folder: Path) -> None:
    ray.init(
        address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False,
        object_store_memory=80 * 2**20,
    )  # fmt: skip
    commands = [
        Command(name, (sys.executable, "-c", SHOW), folder / f"{name}.log", num_devices=count)
        for count, name in enumerate(("one", "two", "three"), start=1)
    ]
    assert all(result.returncode == 0 for result in run_commands(commands, 1, None))
    said = {command.name: command.log_path.read_text().strip() for command in commands}
    too_large = Resources(1, 5)
    said["lacking"] = describe_lacking_room(too_large)
    said["waiting"] = WaitingCommands([Command("x", (), folder / "x.log")], too_large).describe().partition(";")[0]
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
