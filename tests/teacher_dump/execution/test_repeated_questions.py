"""A teacher that generates answers is asked failed questions again after images and rows were fixed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from storage.backends.folder import open_folder
from storage.layout.retries import read_contents
from storage.layout.segments import read_segments
from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from teacher_dump.__main__ import main
from teacher_dump.execution.answer_generation import JOB_FILE, answer_parts
from teacher_dump.execution.repeated_questions import answer_failed_questions, begin_reasking
from teacher_dump.planning.answer_files import LATER_FILE, resolve_answers_folder
from teacher_dump.planning.dump_plan import plan_questions
from teacher_dump.settings import DumpSettings, read_settings
from tests.teacher_dump.conftest import WriteConfig
from tests.teacher_dump.ray_head import RayHead
from tests.tiny import make_tiny_dataset

REPOSITORY = Path(__file__).parents[3]
NUM_SAMPLES = 24


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Writes 24 questions about 8 images: the first image is broken, the second missing, and the last row broken.

    `whole` has the same data with nothing broken.
    """
    file = make_tiny_dataset(tmp_path / "whole", num_samples=NUM_SAMPLES, num_images=8)["train"]
    shutil.copytree(tmp_path / "whole", tmp_path / "data")
    text = file.read_text(encoding="utf-8")
    (tmp_path / "data/train.jsonl").write_text(text.rstrip()[:-1] + "\n", encoding="utf-8")
    (tmp_path / "data/images/train-000.png").write_bytes(b"no image")
    (tmp_path / "data/images/train-001.png").unlink()
    return tmp_path


@pytest.fixture
def config(project: Path, write_config: WriteConfig, talker: Path) -> Path:
    data: dict[str, Any] = {"sources": [{"path": str(project / "data/train.jsonl")}], "responses": "teacher"}
    return write_config(
        data={**data, "sampling": {"max_new_tokens": 24}},
        teacher={"model": str(talker)},
        cache={"families": []},
        dump={"max_error_fraction": 0.99, "samples_per_part": 8},
    )


def fix_project(project: Path) -> None:
    shutil.copytree(project / "whole", project / "data", dirs_exist_ok=True)


def get_answers_folder(settings: DumpSettings) -> Path:
    return resolve_answers_folder(settings, plan_questions(settings).identity)


def reask_in_this_process(settings: DumpSettings) -> None:
    """Asks the failed questions again in this process, as a retry that is stopped afterwards would."""
    folder = open_folder(settings.cache.path)
    segments = read_segments(folder)
    failed = {error.sample_id for errors in read_contents(folder, segments, segments[0])[1] for error in errors}
    work = begin_reasking(settings, get_answers_folder(settings), failed)
    again = json.loads((work / JOB_FILE).read_bytes())["again"]
    for stripe in range(2):
        answer_failed_questions(work, again, settings, stripe=stripe, num_stripes=2)


def contents(path: Path) -> dict[str, list[int]]:
    cache = Cache.open(path)
    assert verify(path).problems == []
    return {name: cache.read(number).tokens.token_ids.tolist() for number, name in enumerate(cache.sample_ids)}


def refused_ids(path: Path) -> set[str]:
    return {error.sample_id for error in Cache.open(path).errors}


def hash_files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "dump.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def dump_whole(project: Path, config: Path) -> dict[str, list[int]]:
    """Returns the contents of a dump of data without faults."""
    places = {"runs_dir": project / "other", "cache.path": project / "reference"}
    overrides = [f"{name}={json.dumps(str(place))}" for name, place in places.items()]
    overrides.append(f"data.sources=[{{path: {json.dumps(str(project / 'whole/train.jsonl'))}}}]")
    answer_parts(read_settings(config, overrides), stripe=0, num_stripes=1)
    assert main([str(config), *overrides]) == 0
    return contents(project / "reference")


def test_fixed_questions_are_asked_again_and_become_samples(
    project: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, cache = read_settings(config), project / "cache"
    answer_parts(settings, stripe=0, num_stripes=1)
    assert main([str(config)]) == 0
    first, answers = contents(cache), get_answers_folder(settings)
    broken = {name for name in (f"train-{n:04d}" for n in range(NUM_SAMPLES)) if int(name[-4:]) % 8 < 2}
    assert broken < refused_ids(cache)
    before, given = hash_files(cache), hash_files(answers)
    reask_in_this_process(settings)  # with nothing mended
    assert main([str(config), "--retry-errors"]) == 0
    assert "cannot be read yet, for the same reasons as before" in capsys.readouterr().out
    assert hash_files(cache) == before
    file = project / "data/train.jsonl"
    file.write_text(file.read_text(encoding="utf-8").rstrip()[:-4] + "\n", encoding="utf-8")
    (project / "data/images/train-001.png").write_bytes(b"no image, but a file")
    reask_in_this_process(settings)
    assert main([str(config), "--retry-errors"]) == 0
    assert "4 of " in capsys.readouterr().out  # the questions about that image, and the last row, fail otherwise now
    assert contents(cache) == first
    newest = {error.sample_id: error.reason for error in Cache.open(cache).errors}
    assert newest["train-0001"].startswith("image 'images/train-001.png'")
    fix_project(project)
    assert get_answers_folder(settings) == answers  # although there are more questions now
    reask_in_this_process(settings)
    assert main([str(config), "--retry-errors"]) == 0
    shown = capsys.readouterr().out
    expected = dump_whole(project, config)
    missing = expected.keys() - first.keys()
    assert missing & broken  # or nothing was shown
    assert contents(cache) == expected
    assert {name: expected[name] for name in first} == first
    assert f"{NUM_SAMPLES - len(expected)} have no record now" in shown
    after = hash_files(cache)
    assert {name: after[name] for name in before} == before
    kept = hash_files(answers)
    assert {name: kept[name] for name in given} == given  # the answers of all others, byte by byte
    assert not (answers / "again").exists()
    assert main([str(config)]) == 0  # the plan of then, and the later answers, are known again
    assert hash_files(cache) == after
    assert main([str(config), "cache.families=[images]"]) == 0  # to the samples of the retry as well
    assert contents(cache) == expected


def test_a_retry_without_the_answers_of_the_cache_is_refused_before_anything_is_asked(
    project: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = read_settings(config)
    answer_parts(settings, stripe=0, num_stripes=1)
    assert main([str(config)]) == 0
    file = project / "data/train.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("what colour", "which colour"), encoding="utf-8")
    assert main([str(config), "--retry-errors"]) == 2
    assert "has none for the questions of data.sources; undo all changes" in capsys.readouterr().err
    assert len(list((settings.run / "answers").iterdir())) == 1


@pytest.mark.slow
def test_the_command_asks_again_in_processes_of_its_own(ray_head: RayHead, project: Path, config: Path) -> None:
    settings = read_settings(config)
    answer_parts(settings, stripe=0, num_stripes=1)
    assert main([str(config)]) == 0
    first = contents(project / "cache")
    fix_project(project)
    command = [sys.executable, "-m", "teacher_dump", str(config), "--retry-errors"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=ray_head.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "failed questions again" in done.stdout + done.stderr
    assert contents(project / "cache").items() > first.items()
    assert (get_answers_folder(settings) / LATER_FILE).exists()
