"""The repair of a whole environment: virtual ones with fake wheels, and the one that runs these tests."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS_OPERATORS = (
    "import torch\n"
    "if torch.defined != {'torchvision::nms', 'torchvision::qnms'}:\n"
    "    raise RuntimeError('operator torchvision::nms does not exist')\n"
    "ready = True\n"
)


class Environment:
    """A virtual environment without pip, with fake wheels."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        [self.packages] = folder.glob("lib/python*/site-packages")
        self.add("torch", "defined = set()\n")
        self.add("torch/library", "import torch\ndef define(name, schema):\n    torch.defined.add(name)\n")

    def add(self, package: str, code: str) -> Path:
        """A package of one file; returns the file."""
        file = self.packages / package / "__init__.py"
        file.parent.mkdir()
        file.write_text(code, encoding="utf-8")
        return file

    def run(self, *arguments: str, finds_ours: bool = False) -> subprocess.CompletedProcess[str]:
        """Runs its Python outside of the repository."""
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if finds_ours:
            variables["PYTHONPATH"] = str(ROOT)
        command = [str(self.python), *arguments]
        return subprocess.run(command, cwd="/", env=variables, capture_output=True, text=True, check=False)

    def repair(self) -> str:
        done = self.run("-m", "teacher_dump.environment", finds_ours=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout


@pytest.fixture
def fresh(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


def test_an_environment_is_repaired_for_every_python_and_its_children(fresh: Environment) -> None:
    fresh.add("torchvision", NEEDS_OPERATORS)
    fresh.add("torchaudio", "raise OSError('libtorchaudio.so')\n")
    fresh.add("torchcodec", "heard = True\n")
    code = (
        "import importlib.util as u, torchvision, torchcodec; "
        "print(torchvision.ready, torchcodec.heard, u.find_spec('torchaudio'), torchvision.__loader__.name)"
    )
    assert "does not exist" in fresh.run("-c", code).stderr
    assert "repairs torchvision, hides torchaudio in every Python" in fresh.repair()
    expected = "True True None torchvision\n"
    assert fresh.run("-c", code).stdout == expected
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    assert fresh.run("-c", child).stdout == expected
    assert fresh.run("-c", f"import teacher_dump; {code}", finds_ours=True).stdout == expected  # both hooks at once
    assert "repairs torchvision, hides torchaudio" in fresh.repair()  # its own repair does not deceive it
    assert fresh.run("-c", code).stdout == expected


def test_the_repair_goes_when_the_wheels_match(fresh: Environment) -> None:
    broken = fresh.add("torchvision", NEEDS_OPERATORS)
    fresh.repair()
    broken.write_text("ready = 'by itself'\n", encoding="utf-8")
    assert fresh.run("-c", "import torchvision; print(torchvision.ready)").stdout == "by itself\n"
    assert "nothing to do" in fresh.repair()
    assert not list(fresh.packages.glob("stillhouse*"))


def test_nothing_is_written_where_nothing_is_broken(fresh: Environment) -> None:
    fresh.add("torchvision", "")
    assert "nothing to do" in fresh.repair()
    assert not list(fresh.packages.glob("stillhouse*"))


def test_the_repair_imports_next_to_nothing_at_a_start_and_survives_the_removal_of_its_copy(fresh: Environment) -> None:
    fresh.add("torchvision", NEEDS_OPERATORS)
    before = fresh.run("-c", "import sys; print(*sorted(sys.modules))").stdout.split()
    fresh.repair()
    after = fresh.run("-c", "import sys; print(*sorted(sys.modules))").stdout.split()
    allowed = {"__future__", "importlib", "importlib._bootstrap", "importlib._bootstrap_external", "warnings"}
    assert set(after) - set(before) - allowed == {"stillhouse_torch_companions"}
    (fresh.packages / "stillhouse_torch_companions.py").unlink()
    done = fresh.run("-c", "print('started')")
    assert (done.stdout, done.stderr) == ("started\n", "")


def test_an_argument_is_refused(fresh: Environment) -> None:
    done = fresh.run("-m", "teacher_dump.environment", "--uninstall", finds_ours=True)
    assert done.returncode == 2
    assert "unexpected argument '--uninstall'" in done.stderr


@pytest.mark.parametrize(
    "line",
    ["from transformers import LlamaConfig", pytest.param("from vllm import LLM", marks=pytest.mark.slow)],
)
def test_the_environment_of_these_tests_imports_transformers_and_vllm_in_a_plain_python(line: str) -> None:
    """No module of ours is imported. `make` sees to it; by hand `python -m teacher_dump.environment` does."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", line], cwd="/", env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
