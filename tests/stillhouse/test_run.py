"""An experiment with a tiny teacher in real vLLM and Ray, end to end: killed in the dump, and run two times more."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from tests.processes import MARK, marked_processes
from tests.teacher_dump.ray_head import RayHead
from tests.tiny import make_tiny_dataset, make_tiny_llava

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PATIENCE_S = 1200.0  # with a command that takes a minute or two on an idle machine
NUM_SAMPLES = {"train": 24, "test": 8}


def write_experiment(folder: Path, *, is_long: bool) -> Path:
    data = {
        split: make_tiny_dataset(folder / split, num_samples=num, num_images=4, splits=(split,))[split]
        for split, num in NUM_SAMPLES.items()
    }
    make_tiny_llava(folder / "teacher")
    make_tiny_llava(folder / "student", num_layers=1, seed=1)
    stage = {
        "init": str(folder / "student"),
        "steps": 2,
        "global_batch": 8,
        "micro_batch": 4,
        "precision": "fp32",
        "log_every": 1,
    }
    losses = {"response": {}, "visual": {}, "relation": {}}
    document = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "data": {
            "sources": [{"path": str(path), "images": str(path.parent), "split": name} for name, path in data.items()]
        },
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "max_length": 128},
        "dump": {"samples_per_part": 4},
        "stages": {"sft": {**stage, "zero_stage": 0}, "dft": {**stage, "losses": losses}},
        "evaluation": {"max_new_tokens": 4},
        "ablations": {
            "seeds": [0, 1],
            "controls": ["sft"],
            "runs": {"sft": {"stage": "sft"}, "kd_full": {"stage": "dft", "set": {"losses.visual.weight": 0.5}}},
        },
    }
    if not is_long:
        document["teacher"]["backend"] = "transformers"
        train = [source for source in document["data"]["sources"] if source["split"] == "train"]
        document["more_caches"] = {"labels": {"set": {"data.sources": train, "cache.families": []}}}
        caches = {"cache": "{run}/caches/labels", "evaluation_cache": "{run}/cache"}
        document["ablations"] |= {"seeds": [0], "controls": []}
        document["ablations"]["runs"]["sft"]["set"] = caches
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def stillhouse(*arguments: str, environment: Mapping[str, str] = ENVIRONMENT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stillhouse", *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_a_commit(run: subprocess.Popen[str], cache: Path, *, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not list((cache / "commits").glob("*.json")):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, "no part was committed"
        time.sleep(0.02)


def test_an_experiment_of_one_run_ends_in_its_report(ray_head: RayHead, tmp_path: Path) -> None:
    """The short form of the next test: the reference teacher, one seed, nothing killed.

    One run trains on a second cache, and is evaluated on the samples of the first.
    """
    mark = secrets.token_hex(8)
    environment = {**ENVIRONMENT, **ray_head.environment, MARK: mark}
    run = stillhouse("run", str(write_experiment(tmp_path, is_long=False)), environment=environment)
    said, _ = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, said
    deadline = time.monotonic() + 60
    while left := marked_processes(mark):  # in the cluster, which goes on
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    *_, page, _, _, gain, cost = said.splitlines()
    assert page.endswith("report.html")
    assert gain == "There is nothing to compare: no distilled run has a control."
    assert cost.startswith("Summed over runs, training took ")
    folder = tmp_path / "runs" / "tiny"
    assert Cache.open(folder / "cache").num_samples == sum(NUM_SAMPLES.values())
    assert verify(folder / "cache").ok
    labels = Cache.open(folder / "caches" / "labels")
    assert labels.num_samples == NUM_SAMPLES["train"]
    assert (labels.families, labels.splits.unique()) == (("tokens",), ["train"])
    evaluated = json.loads((folder / "models" / "sft" / "seed0" / "evaluation.json").read_bytes())
    assert evaluated["num_samples"] == NUM_SAMPLES["test"]
    report = json.loads((folder / "report.json").read_bytes())
    assert [(run["name"], run["num_seeds"]) for run in report["runs"]] == [("sft", 1), ("kd_full", 1)]
    assert report["cache"]["num_rows"] > 0
    assert report["dump"]["tokens_per_s"] > 0
    assert "<svg" in (folder / "report.html").read_text()


@pytest.mark.ci
@pytest.mark.slow
def test_an_experiment_runs_end_to_end_through_kills(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, is_long=True)
    folder = tmp_path / "runs" / "tiny"

    killed = stillhouse("run", str(config))
    wait_for_a_commit(killed, folder / "cache")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()

    second = stillhouse("run", str(config))
    said, _ = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0, said
    *_, page, _, scope, gain, cost = said.splitlines()
    assert page.endswith("report.html")
    assert scope == "Exact match of all answers."
    assert "kd_full" in gain
    assert cost.startswith("Summed over runs, training took ")

    cache = Cache.open(folder / "cache")
    expected = {f"{split}-{index:04d}" for split, num in NUM_SAMPLES.items() for index in range(num)}
    assert sorted(cache.sample_ids) == sorted(expected)
    assert verify(folder / "cache").ok
    report = json.loads((folder / "report.json").read_bytes())
    assert [run["name"] for run in report["runs"]] == ["sft", "kd_full"]
    assert [run["num_seeds"] for run in report["runs"]] == [2, 2]
    assert report["runs"][0]["kl_to_teacher"]["mean"] > 0
    assert report["cache"]["num_rows"] > 0
    assert report["dump"]["tokens_per_s"] > 0
    assert "<svg" in (folder / "report.html").read_text()

    before = {path: path.stat().st_mtime_ns for path in folder.glob("models/**/summary.json")}
    assert len(before) == 4
    third = stillhouse("run", str(config))
    said, _ = third.communicate(timeout=PATIENCE_S)
    assert third.returncode == 0, said
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("models/**/summary.json")}

    image = next((tmp_path / "test" / "images").iterdir())
    model = folder / "models" / "kd_full" / "seed0"
    asked = stillhouse("ask", "--model", str(model), "--image", str(image), "--max-new-tokens", "3", "what colour?")
    said, _ = asked.communicate(timeout=PATIENCE_S)
    assert asked.returncode == 0, said
