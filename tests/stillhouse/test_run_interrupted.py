"""A whole small experiment, ended at ten moments by each signal: no process is left, the table is the undisturbed one.

Ten minutes and more for each signal on two cores. SEED chooses other moments. Seven of the ten come after some
seconds, and three while the dump, the grid and the report are at work, however fast the machine is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import start_marked

ROOT = Path(__file__).parents[2]
NUM_MOMENTS = 10
STEPS = ("dump", "grid", "report")  # a moment in each of them, besides those after some seconds
WHOLE_S = 3000.0  # of a run that nobody ends: an upper limit for a machine under load
OWN_END_S = 30.0  # of a run that the signal found at its end
START_S = 5.0  # of Python itself, before anybody handles signals
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
class Moment:
    """When a signal is sent: so many seconds after the start or, with a step, after its first piece of work."""

    seconds: float
    step: str = ""

    def sooner(self) -> Moment:
        """For a machine that is less busy than it was."""
        return self if self.step else Moment(0.9 * self.seconds)

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s into the {self.step}" if self.step else f"after {self.seconds:.1f} s"


@dataclass(frozen=True)
class Ending:
    """How one run was ended."""

    moment: Moment
    after_s: float  # since the start of the command
    code: int
    seconds_left: float  # between the signal and the end of the last process
    running: str  # when the signal came
    last_words: str  # of its output, before the signal

    def __str__(self) -> str:
        return (
            f"{self.moment} ({self.after_s:.1f} s after the start; {self.running}; {self.last_words!r}): "
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

    def run_whole(self) -> None:
        """Runs it to its end."""
        assert self.end_at(Moment(math.inf), signal.SIGTERM)

    def end_at(self, moment: Moment, number: signal.Signals) -> bool:
        """Runs it, sends a signal at a moment, waits until no process is left. Returns whether it ended by itself."""
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}"}
        argv = [sys.executable, "-m", "stillhouse", "run", str(self.config)]
        has_begun = self.watch(moment.step)
        started = time.monotonic()
        command = start_marked(argv, self.folder / "log", cwd=self.folder, environment=environment)
        try:
            deadline = math.inf
            while command.process.poll() is None and time.monotonic() < deadline:
                assert time.monotonic() < started + WHOLE_S, command.text()
                if deadline == math.inf and has_begun():
                    deadline = (time.monotonic() if moment.step else started) + moment.seconds
                time.sleep(0.02)
            if command.process.poll() is not None:
                assert command.wait() == 0, command.text()
                assert command.processes() == {}
                return True
            running, words = describe(command.processes().values()), command.text().split()
            sent = time.monotonic()
            command.process.send_signal(number)
            left = command.wait_until_gone(LEFT_S)
            seconds_left = time.monotonic() - sent
            assert left == {}, command.text()
            code = command.wait(LEFT_S)
            ending = Ending(moment, sent - started, code, seconds_left, running, " ".join(words[-12:]))
            self.endings.append(ending)
            sys.stdout.write(f"{number.name} {ending}\n")
            sys.stdout.flush()
            assert code != 0 or seconds_left < OWN_END_S, f"it went on after the signal: {command.text()}"
            if code != 0:  # else it had come to its end
                assert code == (-number if number == signal.SIGKILL else 128 + number), command.text()
            return code == 0
        finally:
            command.kill()

    def watch(self, step: str) -> Callable[[], bool]:
        """Whether a step has done a first piece of work since now; without a step always."""
        patterns = {
            "": "steps", "dump": "cache/commits/*", "grid": "models/*/seed*/metrics.jsonl", "report": "ablations.json",
        }  # fmt: skip
        known = states(self.run.glob(patterns[step]))
        return lambda: not step or states(self.run.glob(patterns[step])) != known

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


def states(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """What tells whether files have changed; without those that are gone meanwhile."""
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found[path] = (path.stat().st_mtime_ns, path.stat().st_size)
    return found


def describe(lines: Iterable[str]) -> str:
    """What runs, by the command lines of its processes."""
    lines = list(lines)
    known = r"--stage (\S+)|(ray::\S+)|(prepare_small|student_train\.evaluate|gcs_server|raylet)"
    found = {next(filter(None, match.groups())) for line in lines for match in re.finditer(known, line)}
    return f"{len(lines)} processes: {', '.join(sorted(found)) or 'the command'}"


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
    experiment.run_whole()
    return experiment.table(), time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=["term", "int", "kill"])
def test_ten_moments(
    tmp_path: Path, undisturbed: tuple[dict[str, Any], float], number: signal.Signals,
) -> None:  # fmt: skip
    """The moments in an order of chance; a run that ends is compared and begun anew."""
    expected, seconds = undisturbed
    draw = random.Random(f"{os.environ.get('SEED', '0')} {number}")
    num_timed = NUM_MOMENTS - len(STEPS)
    moments = [Moment(max(START_S, (part + draw.random()) / num_timed * seconds)) for part in range(num_timed)]
    moments += [Moment(0.2 * draw.random(), step) for step in STEPS]  # a report takes half a second
    draw.shuffle(moments)
    experiment = write_experiment(tmp_path)
    while moments:
        num_before = len(experiment.endings)
        if experiment.end_at(moments[0], number):
            assert experiment.table() == expected
            experiment.clear()
        if len(experiment.endings) > num_before:
            moments.pop(0)
        else:  # it had come to its end before
            moments[0] = moments[0].sooner()
    experiment.run_whole()
    assert experiment.table() == expected
