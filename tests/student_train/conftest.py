"""Fixtures of the student's tests: a tiny checkpoint, a cache that fits it, runs of the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from storage.processes import torchvision_shim
from tests.free_port import free_port
from tests.student_train.caches import make_cache
from tests.tiny import make_tiny_llava

os.environ["HF_HUB_OFFLINE"] = "1"
torchvision_shim.import_torch_companions()  # the tests' tiny model is built with torchvision's image processor

ROOT = Path(__file__).resolve().parents[2]
MAIN = ROOT / "student_train" / "main.py"
IN_TURN = """
import contextlib, io, json, os, sys, time
root, prologue, lines = sys.argv[1:]
sys.path[0] = root
exec(prologue)
from student_train.command import main
outcomes = []
for line in json.loads(lines):
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = main(line, started=time.monotonic())
    outcomes.append({"code": code, "stderr": stderr.getvalue()})
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(outcomes))
"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA: SigLIP tower of 16 visual tokens, tokenizer of 300, head of 320 rows."""
    return make_tiny_llava(tmp_path_factory.mktemp("checkpoint") / "llava", num_layers=1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A cache with 24 samples each of `train` and `test`, all families, top 8."""
    return make_cache(tmp_path_factory.mktemp("cache"), checkpoint)


@dataclass(frozen=True)
class Outcome:
    """Exit code and stderr of a command line."""

    code: int
    stderr: str


@dataclass(frozen=True)
class Runner:
    """Runs student_train/main.py on a configuration of its own."""

    folder: Path
    document: dict[str, Any]

    @property
    def config(self) -> Path:
        return self.folder / "pipeline.yaml"

    def output(self, stage: str) -> Path:
        return self.folder / "runs" / "t" / f"{stage}-0"

    def run(self, stage: str, *arguments: str) -> Outcome:
        """Run one command line with plain Python."""
        self.config.write_text(yaml.safe_dump(self.document))
        done = self._python([str(MAIN), *self._arguments(stage, arguments)])
        return Outcome(done.returncode, done.stderr)

    def run_in_turn(
        self, *commands: Sequence[str], prologue: str = "", ranks: int = 1, nodes: int = 1
    ) -> list[Outcome]:
        """Run command lines (stage, arguments) in turn in the same processes; return the first rank's outcomes.

        `prologue`: Python code to run first. Several ranks are started by torchrun; each of `nodes` has a torchrun of
        its own, and an equal number of ranks.
        """
        self.config.write_text(yaml.safe_dump(self.document))
        script = self.folder / "in_turn.py"
        script.write_text(IN_TURN)
        lines = [self._arguments(stage, arguments) for stage, *arguments in commands]
        command = [str(script), str(ROOT), prologue, json.dumps(lines)]
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks // nodes}"]
        if nodes > 1:
            done = self._nodes(torchrun, command, nodes)
        else:
            done = self._python([*torchrun, "--standalone", *command] if ranks > 1 else command)
        assert done.returncode == 0, done.stderr
        return [Outcome(**outcome) for outcome in json.loads(done.stdout.splitlines()[-1])]

    def _nodes(self, torchrun: Sequence[str], command: Sequence[str], nodes: int) -> subprocess.CompletedProcess[str]:
        """Run one torchrun for each node; return the first one's result. Tries another port if one is taken."""
        done = []
        for _ in range(5):
            meeting = [f"--nnodes={nodes}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
            lines = [[*torchrun, *meeting, f"--node_rank={node}", *command] for node in range(nodes)]
            with ThreadPoolExecutor(nodes) as pool:
                done = list(pool.map(self._python, lines))
            if "EADDRINUSE" not in done[0].stderr:
                break
        return done[0]

    def _arguments(self, stage: str, arguments: Sequence[str]) -> list[str]:
        return [str(self.config), "--stage", stage, *arguments]

    def _python(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=self.folder,
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip


@pytest.fixture(scope="session")
def make_runner(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, cache: Path) -> Callable[..., Runner]:
    """Makes runners over the shared checkpoint and cache; each stage is given by the fields that differ."""

    def make(**stages: dict[str, Any]) -> Runner:
        folder = tmp_path_factory.mktemp("run")
        common = {
            "init": str(checkpoint), "output": "{run}/{stage}-{seed}", "steps": 4, "global_batch": 12,
            "micro_batch": 12, "lr": 2e-3, "precision": "fp32", "log_every": 1,
        }  # fmt: skip
        named = {name: {**common, **fields} for name, fields in stages.items()}
        return Runner(folder, {"name": "t", "runs_dir": "runs", "cache": {"path": str(cache)}, "stages": named})

    return make
