"""Runs with `rounds`: the model of each round answers the questions that the next one trains on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from stillhouse.ablate import check_round_caches, dump_round_cache, group_by_parent, list_grid
from stillhouse.check import check_experiment
from stillhouse.config import read_experiment
from stillhouse.ledger import Ledger
from storage.errors import ConfigError, IdentityError
from storage.reader.cache import Cache
from teacher_dump.execution.answer_generation import answer_parts, generate_missing_answers
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.answer_files import load_answered_settings
from teacher_dump.planning.dump_plan import plan_dump, plan_questions
from teacher_dump.settings import read_settings
from teacher_dump.workers.worker import Worker
from tests.tiny import make_tiny_dataset, make_tiny_llava

FORMAT = {"format": "pt"}  # of safetensors
STAGE = {"init": "{run}/student", "steps": 2, "global_batch": 4, "micro_batch": 4, "precision": "fp32", "zero_stage": 0}
ROUNDS = {"number": 2, "set": {"data.sampling.temperature": 1.0, "dump.max_error_fraction": 0.9}}
RUNS = {
    "sft": {"stage": "sft"},
    "on_policy": {"stage": "kd", "after": "sft", "rounds": ROUNDS, "controls": ["sft"]},
}


def write(
    folder: Path, runs: dict[str, Any], *, seeds: tuple[int, ...] = (0,), controls: tuple[str, ...] = ("sft",)
) -> Path:
    sources = [{"path": str(folder / f"{split}.jsonl"), "split": split} for split in ("train", "validation", "test")]
    document = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "data": {"sources": sources},
        "teacher": {"model": str(folder / "teacher"), "backend": "transformers", "max_length": 96},
        "dump": {"samples_per_part": 4},
        "cache": {"families": ["response"], "response": {"method": "topk", "k": 8}},
        "stages": {
            "sft": STAGE,
            "kd": {**STAGE, "losses": {"cross_entropy": 0, "response": {"divergence": "reverse_kl"}}},
            "made": {**STAGE, "prune": {"model": str(folder / "teacher"), "layers": 1}},
        },
        "evaluation": {"max_new_tokens": 4},
        "ablations": {"seeds": list(seeds), "controls": list(controls), "runs": runs},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_each_round_starts_from_the_one_before_and_learns_its_answers(tmp_path: Path) -> None:
    later = {"stage": "kd", "after": "on_policy"}
    experiment = read_experiment(write(tmp_path, {**RUNS, "later": later}, seeds=(3, 7)))
    groups = [[run.label for run in group] for group in group_by_parent(experiment)]
    assert groups == [
        ["sft-seed3", "sft-seed7"],
        ["on_policy_round1-seed3", "on_policy_round1-seed7"],
        ["on_policy_round2-seed3", "on_policy_round2-seed7"],
        ["later-seed3", "later-seed7"],
    ]
    run, models = tmp_path / "runs" / "tiny", tmp_path / "runs" / "tiny" / "models"
    found = {one.label: one for one in list_grid(experiment)}
    for number, before in ((1, "sft"), (2, "on_policy_round1")):
        one = found[f"on_policy_round{number}-seed7"]
        cache = str(run / "caches" / f"on_policy_round{number}" / "seed7")
        assert one.section.init == str(models / before / "seed7")
        assert (one.section.cache, one.section.evaluation_cache) == (cache, str(run / "cache"))
        settings = read_settings(experiment.path, one.round_overrides)
        assert settings.data.answering_model is not None
        assert settings.data.answering_model.model == one.section.init
        assert [source.split for source in settings.data.sources] == ["train"]  # the others are not trained on
        assert settings.cache.path == one.round_cache == cache
        assert settings.data.sampling.temperature == 1.0
        assert settings.dump.max_error_fraction == 0.9
    assert found["later-seed7"].parent == models / "on_policy_round2" / "seed7"
    assert found["later-seed7"].section.cache is None
    assert found["sft-seed3"].round_cache is None


def test_a_run_with_rounds_is_named_by_its_last_one(tmp_path: Path) -> None:
    runs = {**RUNS, "kd": {"stage": "kd", "controls": ["on_policy"]}}
    ablations = read_experiment(write(tmp_path, runs, controls=("sft", "on_policy"))).ablations
    assert list(ablations.runs) == ["sft", "on_policy_round1", "on_policy_round2", "kd"]
    assert ablations.controls == ("sft", "on_policy_round2")
    assert ablations.get_controls("kd") == ("on_policy_round2",)
    assert ablations.get_controls("on_policy_round1") == ("sft",)


def test_rounds_may_mix_caches_and_lie_elsewhere(tmp_path: Path) -> None:
    """A number is enough, without `after` the stage's init answers, and {round} and {seed} stand in any path."""
    own = "{run}/own/{seed}/{round}"
    caches = [{"path": "{run}/cache", "weight": 1}, {"path": own, "weight": 3}]
    mixed = {"stage": "kd", "rounds": {"number": 1, "cache": own}, "set": {"caches": caches, "init": "{run}/s_{seed}"}}
    runs = {"mixed": mixed, "plain": {"stage": "kd", "rounds": 1}}
    found = {run.label: run for run in list_grid(read_experiment(write(tmp_path, runs, seeds=(0, 4), controls=())))}
    run = tmp_path / "runs" / "tiny"
    one = found["mixed_round1-seed4"]
    assert [source.path for source in one.section.caches or ()] == [str(run / "cache"), str(run / "own/4/1")]
    answering = read_settings(tmp_path / "pipeline.yaml", one.round_overrides).data.answering_model
    assert answering is not None
    assert answering.model == str(run / "s_4")
    assert found["plain_round1-seed0"].section.init == str(run / "student")


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"rounds": 0}, ["rounds.number", "greater than or equal to 1"]),
        ({"rounds": {"nubmer": 2}}, ["nubmer", "did you mean number"]),
        ({"rounds": {"number": 1, "set": {"cache.path": "x"}}}, ["set has 'cache.path'", "rounds.cache"]),
        ({"rounds": {"number": 1, "set": {"data.responses": "teacher"}}}, ["data.responses", "round before"]),
        ({"rounds": {"number": 1, "set": {"data": {}}}}, ["set has 'data'", "round before"]),
        ({"rounds": {"number": 1, "set": {"teacher.model": "x"}}}, ["teacher.model", "data, dump or cache"]),
        ({"rounds": {"number": 1, "set": {"data.samplin.seed": 1}}}, ["samplin", "did you mean sampling"]),
        ({"rounds": {"number": 2, "cache": "{run}/own/{seed}"}}, ["each round has a cache of its own", "{round}"]),
        ({"rounds": {"number": 2, "cache": "{run}/own/{round}"}}, ["each seed has a cache of its own", "{seed}"]),
        ({"rounds": 1, "stage": "made"}, ["prunes", "name a run that trains it by `after`"]),
        ({"rounds": 1, "set": {"cache": "{run}/cache"}}, ["does not train on", "the cache of its own answers"]),
        ({"rounds": 1, "set": {"seed": 4}}, ["set has seed"]),
    ],
)
def test_impossible_rounds_are_refused(tmp_path: Path, run: dict[str, Any], words: list[str]) -> None:
    path = write(tmp_path, {"own": {"stage": "kd", **run}}, seeds=(0, 1), controls=())
    with pytest.raises(ConfigError) as caught:
        list(list_grid(read_experiment(path)))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_rounds_share_a_cache_only_for_equal_answers(tmp_path: Path) -> None:
    def check(one: dict[str, Any], other: dict[str, Any]) -> None:
        runs = {"sft": {"stage": "sft"}, "one": {"stage": "kd", "after": "sft", "rounds": one}}
        runs["other"] = {"stage": "kd", "after": "sft", "rounds": other, "set": {"steps": 3}}
        check_round_caches(read_experiment(write(tmp_path, runs)))

    own = "{run}/own_{round}"
    check({"number": 1, "cache": own}, {"number": 2, "cache": own})  # the first answers are the same
    check({"number": 2}, {"number": 2})  # two paths
    sampled = {"data.sampling.seed": 1}
    for one, other, words in (
        ({"number": 2, "cache": own}, {"number": 2, "cache": own}, "other_round2-seed0 .* as that of one_round2-seed0"),
        ({"number": 1, "cache": own}, {"number": 1, "cache": own, "set": sampled}, "holds other answers"),
        ({"number": 1, "cache": "{run}/cache"}, {"number": 1}, r"as that of cache\.path"),
    ):
        with pytest.raises(ConfigError, match=words):
            check(one, other)


def test_the_example_takes_as_many_steps_in_every_run() -> None:
    """Steps since the common start, and who answers."""
    runs = {run.name: run for run in list_grid(read_experiment(Path("examples/digits/rounds.yaml"))) if run.seed == 0}
    check_round_caches(read_experiment(Path("examples/digits/rounds.yaml")))

    def count_steps(name: str) -> int:
        run = runs[name]
        before = 0 if run.parent is None or run.parent == runs["sft"].folder else count_steps(run.parent.parent.name)
        return before + (run.section.steps or 0)

    assert runs["sft"].parent is None
    finals = ("sft_sft", "off_policy_forward", "off_policy", "one_round_round1", "two_rounds_round2")
    assert {name: count_steps(name) for name in finals} == dict.fromkeys(finals, 250)
    assert runs["one_round_round1"].round_overrides == runs["two_rounds_round1"].round_overrides
    assert runs["two_rounds_round2"].parent == runs["two_rounds_round1"].folder


def test_a_round_and_a_run_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'on_policy_round2' is a round of 'on_policy' and another run"):
        read_experiment(write(tmp_path, {**RUNS, "on_policy_round2": {"stage": "sft"}}))


def write_models_and_data(folder: Path) -> Path:
    """A teacher, a student that ends some of its answers early, and data of three splits; returns the YAML file."""
    for split, num_samples in (("train", 16), ("validation", 2), ("test", 2)):
        file = make_tiny_dataset(folder, num_samples=num_samples, num_images=4, splits=(split,))[split]
        assert file == folder / f"{split}.jsonl"
    make_tiny_llava(folder / "teacher")
    student = make_tiny_llava(folder / "runs" / "tiny" / "student", num_layers=1, seed=1)
    weights = load_file(student / "model.safetensors")
    (head,) = [name for name in weights if name.endswith("lm_head.weight")]
    weights[head][298] *= 6  # the end of a turn
    save_file(weights, student / "model.safetensors", FORMAT)
    path = write(folder, RUNS)
    document = yaml.safe_load(path.read_text())
    (rounds,) = [run["rounds"] for run in document["ablations"]["runs"].values() if "rounds" in run]
    rounds["set"] |= {"data.sampling.max_new_tokens": 24, "data.responses.backend": "transformers"}
    rounds["set"] |= {"dump.blind_check_samples": 0}  # a check of the teacher that costs as much as a part
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def list_times(folder: Path, *patterns: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


def test_a_rounds_cache_holds_the_answers_of_the_model_before(tmp_path: Path) -> None:
    """A sealed cache is kept, one of another model is refused. Everything runs in this process, without Ray."""
    config = write_models_and_data(tmp_path)
    experiment = read_experiment(config)
    student = tmp_path / "runs" / "tiny" / "student"
    runs = {run.name: run for run in list_grid(experiment)}
    shutil.copytree(student, runs["sft"].folder)  # as trained
    trained = shutil.copytree(student, runs["on_policy_round1"].folder)
    weights = load_file(trained / "model.safetensors")
    (head,) = [name for name in weights if name.endswith("lm_head.weight")]
    weights[head][:298] *= 0.7
    save_file(weights, trained / "model.safetensors", FORMAT)
    ledger = Ledger(experiment.run / "steps")
    for number, name in enumerate(("on_policy_round1", "on_policy_round2"), 1):
        settings = read_settings(config, runs[name].round_overrides)
        answer_parts(settings, stripe=0, num_stripes=1)
        questions = plan_questions(settings)
        generate_missing_answers(settings, questions, progress=False)
        found = load_answered_settings(settings, questions.identity)
        assert found is not None
        planned = plan_dump(settings)
        worker = Worker(make_worker_settings(planned, found))
        for part in planned.plan.parts:
            worker.run(part)
        dump_round_cache(experiment, runs[name], ledger)  # every part exists: it seals and verifies
        cache = Cache.open(str(runs[name].round_cache))
        assert cache.sealed
        assert 0 < cache.num_samples == 16 - len(cache.errors)
        assert len(list((experiment.run / "answers").iterdir())) == number
    caches = [Cache.open(str(runs[name].round_cache)) for name in ("on_policy_round1", "on_policy_round2")]
    first, second = (cache.identity.selection["tokens"]["responses"]["model"] for cache in caches)
    assert first != second
    before = list_times(experiment.run, "caches/**/*", "answers/**/*")
    for run in runs.values():
        dump_round_cache(experiment, run, ledger)
    assert list_times(experiment.run, "caches/**/*", "answers/**/*") == before

    shutil.copy(student / "model.safetensors", trained / "model.safetensors")  # trained again, to other weights
    settings = read_settings(config, runs["on_policy_round2"].round_overrides)
    answer_parts(settings, stripe=0, num_stripes=1)
    generate_missing_answers(settings, plan_questions(settings), progress=False)
    with pytest.raises(IdentityError, match=r"(?s)on_policy_round2-seed0: .*answers of an earlier model.*delete"):
        dump_round_cache(experiment, runs["on_policy_round2"], ledger)


def test_check_names_rounds_and_refuses_those_whose_cache_would_not_serve_them(tmp_path: Path) -> None:
    config = write_models_and_data(tmp_path)
    lines = list(check_experiment(read_experiment(config)))
    assert "the answers that on_policy_round1, on_policy_round2 train on" in lines[-1]
    fields = 'ablations.runs.on_policy.rounds.set={"cache.families": []}'
    with pytest.raises(ConfigError, match=r"ablations\.runs\.on_policy_round1: .*read response, which is not dumped"):
        list(check_experiment(read_experiment(config, [fields])))
