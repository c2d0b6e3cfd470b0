"""A verb that is told to stop, or killed, leaves no process and a state that the same command resumes from."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.processes import MarkedCommand, start_marked
from tests.student_train.caches import make_cache
from tests.tiny import make_tiny_dataset, make_tiny_llava

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
PATIENCE_S = 400.0  # until something that takes 10 s on an idle machine has happened
STEPS = 20_000  # more than any test waits for


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML with a cache that is there, two stages (of one rank and of two), a grid and a dump to do."""
    folder = tmp_path_factory.mktemp("stop")
    init = make_tiny_llava(folder / "llava", num_layers=1)
    cache = make_cache(folder, init, num_images=4, splits=("train",))
    data = make_tiny_dataset(folder / "data", num_samples=2000, num_images=8)["train"]
    stage = {
        "init": str(init), "steps": STEPS, "global_batch": 4, "micro_batch": 2, "precision": "fp32", "log_every": 1,
        "zero_stage": 0,
    }  # fmt: skip
    document = {
        "name": "t",
        "runs_dir": str(folder / "runs"),
        "data": {"sources": [{"path": str(data), "images": str(data.parent)}]},
        "teacher": {"model": str(init), "backend": "transformers", "max_length": 128},
        "dump": {"samples_per_part": 2},
        "cache": {"path": str(cache)},
        "stages": {"one": stage, "two": {**stage, "zero_stage": 2, "num_processes": 2}},
        "evaluation": {"max_new_tokens": 2, "splits": ["train"]},
        "ablations": {"seeds": [0, 1], "runs": {"grid": {"stage": "one"}}},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.fixture
def start(experiment: Path, tmp_path: Path) -> Iterator[Callable[..., MarkedCommand]]:
    """Starts `python -m MODULE …`; at the test's end nothing of it is left, whatever the test found."""
    started: list[MarkedCommand] = []

    def run(*words: str, module: str = "stillhouse") -> MarkedCommand:
        argv = [sys.executable, "-m", module, *words]
        started.append(start_marked(argv, tmp_path / f"log-{len(started)}", cwd=ROOT, environment=ENVIRONMENT))
        return started[-1]

    yield run
    for command in started:
        command.kill()


def wait_until(command: MarkedCommand, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert command.process.poll() is None, command.text()
        assert time.monotonic() < deadline, command.text()
        time.sleep(0.05)


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def last_state(output: Path) -> int:
    """The step of the newest state; 0 if there is none."""
    return max((int(path.parent.name.split("-")[1]) for path in output.glob("state/step-*/state.json")), default=0)


def stop_in_the_loop(command: MarkedCommand, outputs: list[Path], stop: Callable[[], None]) -> None:
    """Have every training make three steps more, then stop the command."""
    known = {output: num_lines(output / "metrics.jsonl") for output in outputs}
    # A resumed run rewrites the log up to its state first: only a step beyond what was known is one of this run.
    wait_until(command, lambda: all(num_lines(output / "metrics.jsonl") > known[output] + 3 for output in outputs))
    stop()


def assert_stopped(command: MarkedCommand, code: int) -> None:
    assert command.wait() == code, command.text()
    assert command.processes() == {}
    assert "Traceback" not in command.text()


def test_sigterm_saves_the_state_of_a_training(
    experiment: Path, start: Callable[..., MarkedCommand], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    train = start("train", str(experiment), "--stage", "one", f"stages.one.output={output}")
    stop_in_the_loop(train, [output], train.process.terminate)
    assert_stopped(train, 143)
    assert last_state(output) >= 3
    assert "its state is saved" in train.text()


def test_torchrun_s_ranks_keep_their_exit_code(start: Callable[..., MarkedCommand], tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("raise SystemExit(2)")
    launcher = start("--standalone", "--nproc_per_node=2", str(script), module="student_train.launcher")
    assert launcher.wait() == 2, launcher.text()
    assert "Traceback" not in launcher.text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_training_is_stopped_three_times_and_resumes(
    experiment: Path, start: Callable[..., MarkedCommand], tmp_path: Path, stage: str
) -> None:
    """SIGTERM to the parent alone, Ctrl-C in its terminal, and SIGKILL to the parent."""
    output = tmp_path / "out"
    words = ("train", str(experiment), "--stage", stage, f"stages.{stage}.output={output}")

    train = start(*words)
    stop_in_the_loop(train, [output], train.process.terminate)
    assert_stopped(train, 143)
    first = last_state(output)
    assert first >= 3

    train = start(*words)
    stop_in_the_loop(train, [output], lambda: os.killpg(train.process.pid, signal.SIGINT))
    assert_stopped(train, 130)
    second = last_state(output)
    assert second > first

    train = start(*words)
    stop_in_the_loop(train, [output], train.process.kill)
    assert train.wait_until_gone(60) == {}
    assert last_state(output) > second  # what the parent ran heard of it and saved


@pytest.mark.slow
def test_a_grid_is_stopped_three_times_and_resumes(
    experiment: Path, start: Callable[..., MarkedCommand], tmp_path: Path
) -> None:
    outputs = [tmp_path / "runs" / "t" / "models" / "grid" / f"seed{seed}" for seed in (0, 1)]
    words = ("ablate", str(experiment), f"runs_dir={tmp_path / 'runs'}")

    ablate = start(*words)
    stop_in_the_loop(ablate, outputs, ablate.process.terminate)
    assert_stopped(ablate, 143)
    first = [last_state(output) for output in outputs]
    assert min(first) >= 3

    ablate = start(*words)
    stop_in_the_loop(ablate, outputs, lambda: os.killpg(ablate.process.pid, signal.SIGINT))
    assert_stopped(ablate, 130)
    second = [last_state(output) for output in outputs]
    assert all(after > before for after, before in zip(second, first, strict=True))

    ablate = start(*words)
    stop_in_the_loop(ablate, outputs, ablate.process.kill)
    assert ablate.wait_until_gone(60) == {}


@pytest.mark.parametrize(
    ("module", "verb", "number"),
    [
        ("stillhouse", ("dump",), signal.SIGTERM),
        pytest.param("stillhouse", ("dump",), signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("teacher_dump", (), signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("teacher_dump", (), signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("teacher_dump", (), signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_dump_is_stopped(
    experiment: Path, start: Callable[..., MarkedCommand], tmp_path: Path, module: str, verb: tuple[str, ...],
    number: signal.Signals,
) -> None:  # fmt: skip
    """SIGINT goes to the whole group, Ray's processes too, as a terminal sends it."""
    cache = tmp_path / "cache"
    dump = start(*verb, str(experiment), f"cache.path={cache}", module=module)
    wait_until(dump, lambda: len(list((cache / "commits").glob("part-*.json"))) >= 2)
    if number == signal.SIGINT:
        os.killpg(dump.process.pid, number)
    else:
        dump.process.send_signal(number)
    if number == signal.SIGKILL:
        assert dump.wait_until_gone(60) == {}
    else:
        assert_stopped(dump, 128 + number)
        assert f"stopped by {number.name}: " in dump.text()
    commits = [json.loads(path.read_bytes()) for path in (cache / "commits").glob("part-*.json")]
    assert len(commits) >= 2
    assert not (cache / "manifest.json").exists()
