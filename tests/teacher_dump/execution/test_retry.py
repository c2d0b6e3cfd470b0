"""Failed samples are retried: fixed images and rows, kills, repeated retries, and their messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stillhouse.__main__ import main as stillhouse
from storage.backends.folder import open_folder
from storage.layout.retries import read_contents
from storage.layout.segments import read_segments
from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from teacher_dump.__main__ import main
from teacher_dump.execution.retry import make_retry_plan, select_retryable
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import read_settings
from teacher_dump.workers.worker import Worker
from tests.teacher_dump.conftest import WriteConfig
from tests.tiny import make_tiny_dataset

LENIENT: dict[str, Any] = {"max_error_fraction": 0.9, "samples_per_part": 4}


def hash_files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "dump.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def counts(folder: Path) -> tuple[int, int]:
    cache = Cache.open(folder)
    assert verify(folder).problems == []
    return cache.num_samples, len(cache.errors)


def draw(path: Path, seed: int = 0) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), np.uint8)).save(path)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Writes 20 samples over 4 images; the first image is broken, the second missing, and the last row broken."""
    file = make_tiny_dataset(tmp_path / "data", num_samples=20, num_images=4)["train"]
    lines = file.read_text(encoding="utf-8").splitlines()
    (tmp_path / "whole.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    file.write_text("\n".join([*lines[:-1], lines[-1][:-1]]) + "\n", encoding="utf-8")
    (tmp_path / "data/images/train-000.png").write_bytes(b"no image")
    (tmp_path / "data/images/train-001.png").unlink()
    return tmp_path


@pytest.fixture
def config(project: Path, write_config: WriteConfig) -> Path:
    sources = [{"path": str(project / "data/train.jsonl")}]
    return write_config(cache={"families": []}, data={"sources": sources}, dump=LENIENT)


def test_failed_samples_become_samples_as_they_are_fixed(
    project: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, images = project / "cache", project / "data/images"
    assert main([str(config)]) == 0
    assert counts(cache) == (9, 11)
    before = hash_files(cache)
    capsys.readouterr()
    assert main([str(config), "--retry-errors"]) == 0
    assert "nothing; 11 failed samples cannot be read yet, for the same reasons as before" in capsys.readouterr().out
    assert hash_files(cache) == before
    draw(images / "train-000.png", seed=7)  # another picture than any before
    assert main([str(config), "--retry-errors"]) == 0
    assert "5 of 11 failed samples; 6 have no record now" in capsys.readouterr().out
    assert counts(cache) == (14, 6)
    after = hash_files(cache)
    assert {name: after[name] for name in before} == before
    draw(images / "train-001.png", seed=8)  # these rows were no samples of the plan: the plan is another one now
    shutil.copy(project / "whole.jsonl", project / "data/train.jsonl")
    assert main([str(config)]) == 0  # the plan of then is known again, and its errors are left alone
    assert hash_files(cache) == after
    capsys.readouterr()
    assert main([str(config), "--retry-errors"]) == 0
    assert "6 of 6 failed samples; 0 have no record now" in capsys.readouterr().out
    assert counts(cache) == (20, 0)
    done = hash_files(cache)
    assert main([str(config)]) == 0
    assert stillhouse(["dump", str(config), "--retry-errors"]) == 0
    assert "nothing; this plan has no failed samples" in capsys.readouterr().out
    assert hash_files(cache) == done
    whole = project / "whole"
    assert main([str(config), f"cache.path={json.dumps(str(whole))}"]) == 0
    ours, theirs = Cache.open(cache), Cache.open(whole)
    assert sorted(ours.sample_ids) == sorted(theirs.sample_ids)
    for index, sample_id in enumerate(ours.sample_ids):
        one, other = ours.read(index).tokens, theirs.read(theirs.index_of(sample_id)).tokens
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.images == other.images


def test_a_dump_that_failed_for_too_many_errors_is_finished_by_a_retry(
    project: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = [str(config), "dump.max_error_fraction=0.1"]
    assert main(strict) == 1
    assert not Cache.open(project / "cache").sealed
    draw(project / "data/images/train-001.png")
    assert main([*strict, "--retry-errors"]) == 1  # five with the broken image are left, of twenty
    assert "failed (30.0%" in capsys.readouterr().err
    assert not Cache.open(project / "cache").sealed
    draw(project / "data/images/train-000.png")
    assert main([*strict, "--retry-errors"]) == 0
    assert counts(project / "cache") == (19, 1)
    assert main(strict) == 0


def begin_retry(config: Path, cache: Path) -> None:
    """Writes the first part of a retry, as a dump that is then killed would."""
    settings = read_settings(config, [f"cache.path={json.dumps(str(cache))}"])
    planned, folder = plan_dump(settings), open_folder(cache)
    segments = read_segments(folder)
    failed_ids = select_retryable(planned, settings, read_contents(folder, segments, segments[0])[1])
    writer = CacheWriter.begin_retry(cache, planned.identity, 0, failed_ids)
    again = make_retry_plan(writer.segment, planned, settings)
    assert len(again.plan.parts) > 1
    Worker(make_worker_settings(again, settings)).run(again.plan.parts[0])


def test_a_retry_that_is_stopped_is_finished_by_the_same_command_or_by_a_dump(project: Path, config: Path) -> None:
    assert main([str(config)]) == 0
    for name in ("train-000.png", "train-001.png"):
        draw(project / "data/images" / name)
    copies = [shutil.copytree(project / "cache", project / name) for name in ("undisturbed", "stopped", "other")]
    paths = [f"cache.path={json.dumps(str(path))}" for path in copies]
    assert main([str(config), paths[0], "--retry-errors"]) == 0
    for copy in copies[1:]:
        begin_retry(config, copy)
        assert not Cache.open(copy).sealed
        assert Cache.open(copy).num_samples + len(Cache.open(copy).errors) == 20
    assert main([str(config), paths[1], "--retry-errors"]) == 0
    assert main([str(config), paths[2]]) == 0
    assert counts(copies[0]) == (19, 1)
    assert hash_files(copies[0]) == hash_files(copies[1]) == hash_files(copies[2])


def test_families_and_samples_are_added_after_a_retry(
    project: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = project / "cache"
    assert main([str(config)]) == 0
    for name in ("train-000.png", "train-001.png"):
        draw(project / "data/images" / name)
    assert main([str(config), "--retry-errors"]) == 0
    assert main([str(config), "cache.families=[images]"]) == 0  # to the retry's parts as well
    assert Cache.open(cache).families == ("tokens", "images")
    assert counts(cache) == (19, 1)
    shutil.copy(project / "whole.jsonl", project / "data/train.jsonl")
    assert main([str(config), "--retry-errors"]) == 2
    assert "cache.families: lacks images, which the samples beside" in capsys.readouterr().err
    assert main([str(config), "--retry-errors", "cache.families=[images]"]) == 0
    assert counts(cache) == (20, 0)
    new = make_tiny_dataset(project / "data", num_samples=4, num_images=4, splits=("test",))["test"]
    append = [f"data.sources=[{{path: {json.dumps(str(new))}}}]", "cache.append=true", "cache.families=[images]"]
    assert main([str(config), *append]) == 0
    assert counts(cache) == (24, 0)
    assert main([str(config), "cache.families=[images]"]) == 0


def test_families_are_added_after_a_retry_in_which_everything_failed_otherwise(project: Path, config: Path) -> None:
    assert main([str(config)]) == 0
    (project / "data/images/train-001.png").write_bytes(b"no image, but a file")
    assert main([str(config), "--retry-errors"]) == 0
    assert counts(project / "cache") == (9, 11)
    assert len(read_segments(open_folder(project / "cache"))) == 2  # the newest reasons
    assert main([str(config), "cache.families=[images]"]) == 0
    assert Cache.open(project / "cache").families == ("tokens", "images")
    assert counts(project / "cache") == (9, 11)


def test_both_halves_of_a_preference_pair_are_taken_up_together(tmp_path: Path, write_config: WriteConfig) -> None:
    images = tmp_path / "pairs"
    images.mkdir()
    rows = [
        {"id": f"pair-{number}", "image": f"{number}.png", "prompt": "What?", "chosen": "One.", "rejected": "Two."}
        for number in range(3)
    ]
    (images / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    draw(images / "0.png")
    (images / "1.png").write_bytes(b"no image")
    sources = [{"path": str(images / "pairs.jsonl")}]
    config = write_config(cache={"families": []}, data={"sources": sources}, dump={**LENIENT, "samples_per_part": 1})
    assert main([str(config), "--retry-errors"]) == 0  # where there is no cache yet, a dump like any other
    assert counts(tmp_path / "cache") == (2, 4)
    draw(images / "1.png")
    draw(images / "2.png")
    assert main([str(config), "--retry-errors"]) == 0
    assert counts(tmp_path / "cache") == (6, 0)
    assert len(Cache.open(tmp_path / "cache").pairs()) == 3


def test_own_ids_that_look_like_halves_are_taken_up_alone(
    tmp_path: Path, write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("chosen", "rejected", "whole")
    rows = [{"id": f"x#{name}", "image": f"{name}.png", "question": "What?", "answer": "One."} for name in names]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in names:
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    draw(tmp_path / "whole.png")
    sources = [{"path": str(tmp_path / "rows.jsonl")}]
    config = write_config(cache={"families": []}, data={"sources": sources}, dump=LENIENT)
    assert main([str(config)]) == 0
    draw(tmp_path / "chosen.png", seed=1)
    capsys.readouterr()
    assert main([str(config), "--retry-errors"]) == 0
    assert "1 of 2 failed samples; 1 have no record now" in capsys.readouterr().out
    assert counts(tmp_path / "cache") == (2, 1)
    assert sorted(Cache.open(tmp_path / "cache").sample_ids) == ["x#chosen", "x#whole"]


def test_images_that_are_bytes_in_rows_are_fixed(tmp_path: Path, write_config: WriteConfig) -> None:
    """Such an image is a file named by its hash, so a mended one has another name in the plan."""
    draw(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    file = tmp_path / "rows.parquet"

    def write(second: bytes) -> None:
        rows = [
            {"id": f"row-{number}", "image": content, "question": f"What is {number}?", "answer": "A picture."}
            for number, content in enumerate((good, second, good))
        ]
        pq.write_table(pa.Table.from_pylist(rows), file)

    write(b"no image")
    config = write_config(cache={"families": []}, data={"sources": [{"path": str(file)}]}, dump=LENIENT)
    assert main([str(config)]) == 0
    assert counts(tmp_path / "cache") == (2, 1)
    draw(tmp_path / "other.png", seed=9)
    write((tmp_path / "other.png").read_bytes())
    assert main([str(config), "--retry-errors"]) == 0
    assert counts(tmp_path / "cache") == (3, 0)
    assert main([str(config), "cache.families=[images]"]) == 0
    assert counts(tmp_path / "cache") == (3, 0)
    assert Cache.open(tmp_path / "cache").families == ("tokens", "images")


def test_a_moved_project_and_a_copied_teacher_resume(
    tmp_path: Path, tiny_teacher: Path, write_config: WriteConfig
) -> None:
    """Every absolute path is another one; images, teacher and cache are the same."""
    project = tmp_path / "one"
    file = make_tiny_dataset(project / "data", num_samples=8, num_images=4)["train"]
    shutil.copytree(tiny_teacher, project / "teacher")

    def identity(config: Path) -> Any:
        return plan_dump(read_settings(config, ["cache.families=[response]"])).identity

    config = write_config(
        data={"sources": [{"path": str(file)}]},
        teacher={"model": str(project / "teacher")},
        cache={"families": [], "path": str(project / "cache")},
    )
    first = identity(config)
    assert main([str(config)]) == 0
    before = hash_files(project / "cache")
    (project / "cache/manifest.json").unlink()
    (project / "cache/commits/part-00001.json").unlink()
    moved = tmp_path / "elsewhere/two"
    moved.parent.mkdir()
    shutil.move(project, moved)
    config.write_text(config.read_text(encoding="utf-8").replace(str(project), str(moved)), encoding="utf-8")
    assert identity(config).content_json() == first.content_json()
    assert main([str(config)]) == 0
    assert hash_files(moved / "cache") == before
    assert Cache.open(moved / "cache").image_root == moved / "data"
