"""A user's own files that have the names of our packages, in the folder of his YAML, hide none of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.torchrun import make_training_command
from storage.processes.search_path import PACKAGES, ROOT, find_shadowed_packages

CONSOLE_SCRIPT = str(Path(sys.executable).with_name("stillhouse"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One with modules, a package and a folder of data of those names."""
    for name in ("student_train", "stillhouse"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine", encoding="utf-8")
    for file in ("storage/__init__.py", "storage/errors.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("raise SystemExit('a file of the user was imported')\n", encoding="utf-8")
    return tmp_path


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([sys.executable, "-m", "stillhouse", "inspect", "x"], "CACHE x is not a folder"),
        ([sys.executable, "-P", "-m", "stillhouse", "inspect", "x"], "CACHE x is not a folder"),
        ([CONSOLE_SCRIPT, "inspect", "x"], "CACHE x is not a folder"),
        ([sys.executable, "-m", "teacher_dump", "x.yaml"], "x.yaml: cannot be read"),
        ([sys.executable, "-m", "student_train.evaluate", "x.yaml", "--model", "m"], "x.yaml: cannot be read"),
        ([sys.executable, str(ROOT / "student_train/main.py"), "x.yaml", "--stage", "s"], "x.yaml: cannot be read"),
    ],
)
def test_the_commands_find_our_packages(folder: Path, command: list[str], message: str) -> None:
    (folder / "teacher_dump").mkdir()
    done = run(command, folder)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_the_entry_of_a_rank_finds_them_on_a_safe_path_too(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "student_train/main.py"), "x.yaml", "--stage", "s"]
    done = run(command, folder, PYTHONSAFEPATH="1")
    assert (done.returncode, "x.yaml: cannot be read" in done.stderr) == (2, True), done.stderr


def test_children_are_started_without_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    command = make_training_command(("x.yaml", "--stage", "s"), num_processes=2)
    assert command[1:4] == ("-P", "-m", "student_train.launcher")
    monkeypatch.chdir(ROOT)  # where they may lie without being installed
    command = make_training_command(("x.yaml", "--stage", "s"), num_processes=2)
    assert command[1:3] == ("-m", "student_train.launcher")


def test_only_what_python_would_import_counts_as_shadowing(folder: Path) -> None:
    assert find_shadowed_packages(folder) == ["storage"]
    (folder / "teacher_dump.py").touch()
    assert find_shadowed_packages(folder) == ["storage", "teacher_dump"]
    assert find_shadowed_packages(ROOT) == []
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} >= set(PACKAGES)


def test_the_first_step_of_a_worker_imports_ours_beside_the_users(folder: Path) -> None:
    """It travels as code: the process that runs it has the user's folder first on sys.path, as Ray puts it."""
    code = (
        "import sys, types\n"
        "from teacher_dump.ray_jobs.cluster import _make_setup_hook\n"
        "step = _make_setup_hook(['storage'], besides=FOLDER)\n"
        "for name in [name for name in sys.modules if name.split('.')[0] in ('storage', 'teacher_dump')]:\n"
        "    del sys.modules[name]\n"
        "sys.path.insert(0, FOLDER)\n"
        "step()\n"
        "import storage.errors\n"
        "print(storage.__file__, sys.path[0] == FOLDER)\n"
    ).replace("FOLDER", repr(str(folder)))
    done = run([sys.executable, "-P", "-c", code], folder)
    assert done.stdout == f"{ROOT / 'storage/__init__.py'} True\n", done.stderr[-2000:]


@pytest.mark.slow
def test_a_worker_of_ray_finds_them(folder: Path) -> None:
    (folder / "teacher_dump.py").write_text("raise SystemExit('a file of the user was imported')\n", encoding="utf-8")
    code = (
        "from pathlib import Path\n"
        "from teacher_dump.ray_jobs import Command, run_commands\n"
        "[result] = run_commands([Command('say', ('echo', 'hello'), Path('logs/say.log'))], 1, None)\n"
        "print(result.returncode, Path('logs/say.log').read_text())\n"
    )
    done = run([sys.executable, "-P", "-c", code], folder)
    assert done.stdout == "0 hello\n\n", done.stderr[-2000:]
