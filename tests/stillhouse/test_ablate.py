"""Runs of the grid that start from the checkpoint of another run are trained after it, and again when it changes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stillhouse.ablate import ablate, describe_finished_seeds, group_by_parent, list_grid
from stillhouse.config import Experiment, read_experiment
from stillhouse.reporting.reproduction import record_command
from stillhouse.run import run_experiment
from stillhouse.torchrun import make_training_arguments, make_training_command, make_training_environment
from storage.backends.lock import HeldError, hold_lock
from storage.errors import ConfigError, StillhouseError
from teacher_dump.ray_jobs.cluster import connect_to_ray
from tests.student_train.caches import make_cache
from tests.tiny import make_tiny_llava

WEIGHTS = "model.safetensors"


def write(folder: Path, runs: dict, *, seeds: list[int], cache: str = "nowhere", init: str = "nowhere") -> Path:
    stage = {
        "init": init, "steps": 1, "global_batch": 4, "micro_batch": 4, "lr": 2e-3, "precision": "fp32",
        "log_every": 1, "warmup_fraction": 0,
    }  # fmt: skip
    document = {
        "name": "chain",
        "runs_dir": str(folder / "runs"),
        "data": {"sources": [{"path": str(folder / "train.jsonl"), "split": "train"}]},
        "teacher": {"model": init},
        "dump": {},
        "cache": {"path": cache},
        "stages": {"all": stage, "projector": {**stage, "train": ["projector"]}},
        "evaluation": {"max_new_tokens": 2},
        "ablations": {"seeds": seeds, "runs": runs},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


CHAIN = {
    "first": {"stage": "all"},
    "second": {"stage": "projector", "after": "first"},
    "third": {"stage": "all", "after": "second"},
    "beside": {"stage": "all"},
}


def test_a_run_waits_for_the_one_that_it_starts_from(tmp_path: Path):
    experiment = read_experiment(write(tmp_path, CHAIN, seeds=[3, 7]))
    found = [[run.label for run in wave] for wave in group_by_parent(experiment)]
    assert found == [
        ["first-seed3", "beside-seed3", "first-seed7", "beside-seed7"],  # a seed's runs together: they are compared
        ["second-seed3", "second-seed7"],
        ["third-seed3", "third-seed7"],
    ]
    (second, _) = group_by_parent(experiment)[1]
    assert second.section.init == str(tmp_path / "runs" / "chain" / "models" / "first" / "seed3")
    assert second.section.seed == 3


def test_finished_seeds_are_shown_while_others_train(tmp_path: Path) -> None:
    runs = list(list_grid(read_experiment(write(tmp_path, CHAIN, seeds=[3, 5, 7]))))
    for run in runs:
        run.folder.mkdir(parents=True)
        accuracy = {3: 0.5, 5: 0.7, 7: 0.0}[run.seed] if run.name == "first" else 0.25
        (run.folder / "evaluation.json").write_text(json.dumps({"exact_match": accuracy}))
    shown = describe_finished_seeds(runs, {"beside-seed7"})
    assert shown.split("\n")[:2] == ["run     exact match, 2 of 3 seeds", "first   60.0 ± 14.1 %"]
    assert "beside  25.0 ± 0.0 %" in shown


@pytest.mark.parametrize(
    ("gpus", "num_processes", "words"),
    [
        (1, 2, "gpus_per_run is 1, but run 'first' has 2 processes"),
        (0.5, 2, "gpus_per_run is 0.5, but run 'first' has 2 processes"),
        (2.5, 2, "gpus_per_run is 2.5; beyond 1"),
        (0.5, 1, None),  # two runs share a GPU
        (0, 2, None),  # on CPUs
        (4, 2, None),
        (None, 2, None),
    ],
)
def test_processes_that_would_share_a_gpu_are_refused(
    tmp_path: Path, gpus: float | None, num_processes: int, words: str | None
):
    path = write(tmp_path, {"first": {"stage": "all", "set": {"num_processes": num_processes}}}, seeds=[0])
    overrides = [] if gpus is None else [f"ablations.gpus_per_run={gpus}"]
    if words is None:
        assert read_experiment(path, overrides).ablations.gpus_per_run == gpus
    else:
        with pytest.raises(ConfigError, match=words):
            read_experiment(path, overrides)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ({"a": {"stage": "all", "after": "a"}}, ["a.after is 'a'", "none"]),
        ({"a": {"stage": "all", "after": "b"}, "b": {"stage": "all"}}, ["a.after is 'b'", "above"]),
        ({"a": {"stage": "all"}, "b": {"stage": "all", "after": "a", "set": {"init": "x"}}}, ["b has both"]),
    ],
)
def test_an_impossible_chain_of_runs_is_refused(tmp_path: Path, runs: dict, words: list[str]):
    with pytest.raises(ConfigError) as caught:
        read_experiment(write(tmp_path, runs, seeds=[0]))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def _train_in_new_process(experiment: Experiment, name: str) -> bytes:
    """The weights of a run that shares no start with others."""
    run = next(run for run in list_grid(experiment) if run.name == name)
    output = run.folder.with_name("alone")
    overrides = (*run.overrides, f"stages.{run.stage}.output={output}")
    arguments = make_training_arguments(experiment.path, run.stage, overrides, evaluate=False)
    subprocess.run(make_training_command(arguments, num_processes=1), check=True, env=make_training_environment(1))
    return (output / WEIGHTS).read_bytes()


@pytest.mark.ci
@pytest.mark.slow
def test_a_chain_is_trained_in_order_and_again_when_its_init_changes(tmp_path: Path):
    init = make_tiny_llava(tmp_path / "llava", num_layers=1)
    cache = make_cache(tmp_path, init, num_samples=8, num_images=4)
    path = write(
        tmp_path, {name: CHAIN[name] for name in ("first", "second")}, seeds=[0], cache=str(cache), init=str(init)
    )
    folders = {name: tmp_path / "runs" / "chain" / "models" / name / "seed0" for name in ("first", "second")}

    def times() -> dict[str, int]:
        return {name: (folder / "summary.json").stat().st_mtime_ns for name, folder in folders.items()}

    with connect_to_ray(None, local_cpus=1):
        ablate(read_experiment(path))
        listing = json.loads((tmp_path / "runs" / "chain" / "ablations.json").read_bytes())
        assert listing["command"] == record_command(path, [])  # what the report says of repeating it
        assert [run["caches"] for run in listing["runs"]] == [[str(cache)]] * 2
        assert _train_in_new_process(read_experiment(path), "first") == folders["first"].joinpath(WEIGHTS).read_bytes()
        first, second = (load_file(folder / "model.safetensors") for folder in folders.values())
        start = load_file(init / "model.safetensors")
        moved = {name for name in first if not torch.equal(first[name], second[name])}
        assert moved
        assert all("projector" in name for name in moved)  # the rest is what the first run made of it,
        assert len([name for name in start if name in first and not torch.equal(start[name], first[name])]) > len(moved)

        before = times()
        (folders["first"] / "evaluation.json").touch()  # no weights
        ablate(read_experiment(path))
        assert times() == before

        ablate(
            read_experiment(path, ["stages.all.lr=1e-3"])
        )  # changes the first run alone, but by it the second's start
        after = times()
        assert all(after[name] > before[name] for name in folders)


@pytest.mark.parametrize("verb", [run_experiment, ablate])
def test_a_run_s_folder_has_one_command_at_a_time(tmp_path: Path, verb: Callable[..., object]):
    experiment = read_experiment(write(tmp_path, {"first": CHAIN["first"]}, seeds=[0]))
    with hold_lock(experiment.run / "lock", "the run"):
        with pytest.raises(HeldError, match=f"the run {experiment.run} is in use by .*process"):
            verb(experiment)
        assert not (experiment.run / "steps").exists()
    with pytest.raises(StillhouseError) as caught:  # its data are missing, but nobody is there any more
        verb(experiment)
    assert "in use" not in str(caught.value)
    assert not (experiment.run / "lock").exists()


def test_two_runs_do_not_compose_different_students_in_one_folder(tmp_path: Path):
    parts = {"vision": "v", "llm": "l", "processor": "p"}
    composed = {"stage": "all", "set": {"init": "{run}/composed-{seed}", "compose": parts}}
    other = {"stage": "all", "set": {**composed["set"], "compose": {**parts, "llm": "m"}}}
    path = write(tmp_path, {"first": composed, "second": other}, seeds=[0])
    with pytest.raises(ConfigError, match=r'(?s)first-seed0 and second-seed0 compose .*compose\.llm: was "l", is "m"'):
        ablate(read_experiment(path))
    same = write(tmp_path, {"first": {**composed, "set": {**composed["set"], "init": "x"}}}, seeds=[0, 1])
    with pytest.raises(ConfigError, match=r"compose\.seed: was 0, is 1"):
        ablate(read_experiment(same))


def test_runs_may_share_a_pruned_student_but_not_prune_two_into_one_folder(tmp_path: Path):
    pruned = {"stage": "all", "set": {"init": "{run}/pruned", "prune": {"model": "m", "layers": 8}}}
    fewer = {"stage": "all", "set": {**pruned["set"], "prune": {"model": "m", "layers": 4}}}
    path = write(tmp_path, {"first": pruned, "second": fewer}, seeds=[0])
    with pytest.raises(ConfigError, match=r"(?s)first-seed0 and second-seed0 prune .*prune\.layers: was 8, is 4"):
        ablate(read_experiment(path))
    composed = {"init": "{run}/pruned", "compose": {"vision": "v", "llm": "l", "processor": "p"}}
    path = write(tmp_path, {"first": pruned, "second": {"stage": "all", "set": composed}}, seeds=[0])
    with pytest.raises(ConfigError, match="one has prune, one compose"):
        ablate(read_experiment(path))
    measured = {"model": "m", "layers": 8, "choose": "least_change"}
    runs = {name: {"stage": "all", "set": {"init": "x", "prune": measured, "splits": [name]}} for name in ("a", "b")}
    with pytest.raises(ConfigError, match=r"a-seed0 and b-seed0 prune different"):
        ablate(read_experiment(write(tmp_path, runs, seeds=[0])))


@pytest.mark.slow
def test_pruned_students_are_trained_once_from_one_init(tmp_path: Path):
    teacher = make_tiny_llava(tmp_path / "teacher", num_layers=3)
    cache = make_cache(tmp_path / "cache", teacher)
    prune = {"model": str(teacher), "layers": 2, "choose": "least_change", "slice": 4}
    student = {"init": "{run}/pruned", "prune": prune}
    runs = {"first": {"stage": "all", "set": student}, "second": {"stage": "projector", "after": "first"}}
    path = write(tmp_path, runs, seeds=[0, 1], cache=str(cache), init=str(teacher))
    with connect_to_ray(None, local_cpus=2):
        trained = ablate(read_experiment(path))
        before = [(run.folder / "summary.json").stat().st_mtime_ns for run in trained]
        ablate(read_experiment(path))
    assert [(run.folder / "summary.json").stat().st_mtime_ns for run in trained] == before
    configs = [json.loads((run.folder / "config.json").read_bytes())["text_config"] for run in trained]
    assert [config["num_hidden_layers"] for config in configs] == [2, 2, 2, 2]
    assert (tmp_path / "runs" / "chain" / "pruned" / "composition.json").is_file()
