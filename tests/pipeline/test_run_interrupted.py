"""A whole small experiment, ended at ten moments by each signal: no process is left, the table is the undisturbed one.

Ten minutes and more for each signal on two cores. SEED chooses other moments.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import start_marked

ROOT = Path(__file__).parents[2]
NUM_MOMENTS = 10
LEFT_S = 120.0  # an upper limit for a machine under load; what it took is printed
PREPARE = """
import argparse
from pathlib import Path
from tests.tiny import make_tiny_dataset, make_tiny_llava
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
out = parser.parse_args().out
(out / "data").mkdir(parents=True, exist_ok=True)
make_tiny_dataset(out / "data", num_samples=48, num_images=8, splits=("train", "test"))
make_tiny_llava(out / "models" / "teacher_init")
make_tiny_llava(out / "models" / "student_init", num_layers=1, seed=1)
"""


@dataclass(frozen=True)
class Ending:
    """How one run was ended."""

    after_s: float
    code: int
    seconds_left: float  # between the signal and the end of the last process
    num_processes: int  # when the signal came
    last_line: str  # of its output, before the signal

    def __str__(self) -> str:
        return (
            f"after {self.after_s:5.1f} s, {self.num_processes} processes, {self.last_line!r}: "
            f"code {self.code}, none left after {self.seconds_left:.1f} s"
        )


@dataclass
class Experiment:
    """A YAML in a folder of its own, and how runs of it ended."""

    folder: Path
    config: Path
    endings: list[Ending] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "small"

    def end_after(self, seconds: float, number: signal.Signals | None) -> bool:
        """Runs it, sends a signal after a while, waits until no process is left. Returns whether it ended by itself."""
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}"}
        argv = [sys.executable, "-m", "pipeline", "run", str(self.config)]
        command = start_marked(argv, self.folder / "log", cwd=self.folder, environment=environment)
        try:
            deadline = time.monotonic() + seconds
            while command.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if command.process.poll() is not None or number is None:
                assert command.wait(1200) == 0, command.text()
                assert command.processes() == {}
                return True
            num_processes, lines = len(command.processes()), command.text().split()
            sent = time.monotonic()
            command.process.send_signal(number)
            left = command.wait_until_gone(LEFT_S)
            seconds_left = time.monotonic() - sent
            assert left == {}, command.text()
            code = command.wait(LEFT_S)
            ending = Ending(seconds, code, seconds_left, num_processes, " ".join(lines[-12:]))
            self.endings.append(ending)
            sys.stdout.write(f"{number.name} {ending}\n")
            sys.stdout.flush()
            if code != 0:  # else it had come to its end
                assert code in (-number, 128 + number), command.text()
            return code == 0
        finally:
            command.kill()

    def table(self) -> dict[str, Any]:
        """What the report says, but for what is measured."""
        report = json.loads((self.run / "report.json").read_bytes())
        runs = [
            {name: run[name] for name in ("name", "num_seeds", "exact_match", "kl_to_teacher")}
            for run in report["runs"]
        ]
        return {"runs": runs, "num_rows": report["cache"]["num_rows"], "teacher": report["teacher"]["exact_match"]}

    def clear(self) -> None:
        shutil.rmtree(self.run)


def write_experiment(folder: Path) -> Experiment:
    (folder / "prepare_small.py").write_text(PREPARE)
    sources = [
        {"path": f"{{run}}/data/{split}.jsonl", "images": "{run}/data", "split": split} for split in ("train", "test")
    ]
    stage = {
        "init": "{run}/models/student_init", "steps": 30, "global_batch": 8, "micro_batch": 4, "precision": "fp32",
        "log_every": 1, "zero_stage": 0, "lr": 2e-3,
    }  # fmt: skip
    teacher = {
        **stage, "init": "{run}/models/teacher_init", "output": "{run}/models/teacher", "cache": "{run}/data/cache",
        "num_processes": 2,
    }  # fmt: skip
    document = {
        "name": "small",
        "runs_dir": str(folder / "runs"),
        "prepare": {"script": "prepare_small.py"},
        "train_teacher": {
            "stage": "teacher", "tokenizer": "{run}/models/teacher_init", "data": {"sources": sources},
        },
        "data": {"sources": sources},
        "teacher": {"model": "{run}/models/teacher", "backend": "transformers", "dtype": "float32", "max_length": 128},
        "dump": {"samples_per_part": 4},
        "cache": {"path": "{run}/cache"},
        "stages": {"teacher": teacher, "sft": stage, "dft": {**stage, "losses": {"response": {}, "visual": {}}}},
        "evaluation": {"max_new_tokens": 4, "splits": ["test"]},
        "ablations": {
            "seeds": [0, 1],
            "controls": ["sft"],
            "runs": {"sft": {"stage": "sft"}, "kd": {"stage": "dft", "set": {"num_processes": 2}}},
        },
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return Experiment(folder, path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """The table of a run that nobody ended, and its seconds."""
    experiment = write_experiment(tmp_path_factory.mktemp("undisturbed"))
    started = time.monotonic()
    assert experiment.end_after(math.inf, None)
    return experiment.table(), time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=["term", "int", "kill"])
def test_ten_moments(
    tmp_path: Path, undisturbed: tuple[dict[str, Any], float], number: signal.Signals,
) -> None:  # fmt: skip
    """One moment in each tenth of a run, in an order of chance; a run that ends is compared and begun anew."""
    expected, seconds = undisturbed
    draw = random.Random(f"{os.environ.get('SEED', '0')} {number}")
    moments = [(tenth + draw.random()) / NUM_MOMENTS * seconds for tenth in range(NUM_MOMENTS)]
    draw.shuffle(moments)
    experiment = write_experiment(tmp_path)
    while len(experiment.endings) < NUM_MOMENTS:
        if experiment.end_after(moments[len(experiment.endings)], number):
            assert experiment.table() == expected
            experiment.clear()
            moments[len(experiment.endings)] *= 0.9  # the machine may be less busy than it was
    assert experiment.end_after(math.inf, None)
    assert experiment.table() == expected
