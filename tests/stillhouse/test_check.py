"""`stillhouse check` checks data, teacher and students before anything costs money."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from stillhouse.check import check_experiment
from stillhouse.config import read_experiment
from storage.errors import ConfigError, IdentityError, StillhouseError
from storage.writer.cache_writer import CacheWriter
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import read_settings
from tests.student_train.caches import make_cache
from tests.tiny import make_tiny_dataset, make_tiny_llava
from tests.tiny_architectures import make_teacher


@pytest.fixture
def file(tmp_path: Path) -> Path:
    data = make_tiny_dataset(tmp_path, num_samples=4, num_images=2)
    for name in ("teacher", "student"):
        make_tiny_llava(tmp_path / name)
    stage = {"steps": 1, "losses": {"response": {}, "visual": {}}}
    document = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "data": {"sources": [{"path": str(data["train"]), "images": str(tmp_path), "split": "train"}]},
        "teacher": {"model": str(tmp_path / "teacher"), "dtype": "float32", "max_length": 128},
        "stages": {
            "kd": {"init": str(tmp_path / "student"), **stage},
            "later": {"init": "{run}/models/kd", **stage},
        },
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_student_that_does_not_fit_the_cache_is_found(file: Path) -> None:
    experiment = read_experiment(file)
    student = Path(experiment.stages["kd"].init)
    assert list(check_experiment(experiment))[-3] == f"stages.kd: {student} fits the teacher"  # there is no cache yet
    settings = read_settings(file)
    CacheWriter.open(experiment.cache.path, plan_dump(settings).identity, ("response", "visual"))
    lines = list(check_experiment(experiment))
    assert lines[-3] == f"stages.kd: {student} fits the cache"
    assert lines[-1].startswith("not checked:\n  weights")
    later = experiment.stages["later"].init
    assert f"whether the student of stages.later fits: {later} is not there yet" in lines[-1]
    assert "stages.kd" not in lines[-1]
    assert "verify --replay" in lines[-1]
    config = json.loads((student / "config.json").read_text())
    config["text_config"]["vocab_size"] = 299
    (student / "config.json").write_text(json.dumps(config))
    with pytest.raises(IdentityError, match=r"vocab_size: the cache has 300, the head of .*student 299 rows"):
        list(check_experiment(experiment))


def test_check_reports_what_is_unusual_about_the_data(file: Path) -> None:
    source = json.loads(json.dumps(yaml.safe_load(file.read_text())["data"]["sources"][0]))
    path = Path(source["path"])
    rows = (
        json.loads(path.read_text()) if path.suffix == ".json" else list(map(json.loads, path.read_text().splitlines()))
    )
    image = Path(source["images"]) / rows[0]["image"]
    Image.new("RGB", (32, 32), "red").save(image)
    shutil.copy(image, image.with_name("copy.png"))
    rows[1]["image"] = str(image.with_name("copy.png").relative_to(source["images"]))
    rows.append(
        {
            **rows[0],
            "id": "mute",
            "conversations": [rows[0]["conversations"][0], {"from": "gpt", "value": "x", "weight": 0}],
        }
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = []
    with pytest.raises(ConfigError, match="mute"):
        lines += check_experiment(read_experiment(file))
    for line in check_experiment(read_experiment(file, ("dump.max_error_fraction=0.9",))):
        lines.append(line)
    said = [line for line in lines if line.startswith("data: ")]
    assert any("are of one colour" in line and rows[0]["image"] in line for line in said)
    assert any(f"copy.png = {rows[0]['image']}" in line for line in said)
    assert f"data: 1 of {len(rows)} samples have no label: mute" in said


def test_a_student_with_another_tokenizer_is_found_before_there_is_a_cache(file: Path) -> None:
    student = Path(read_experiment(file).stages["kd"].init)
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(IdentityError, match=r"(?s)does not fit.*tokenizer_fingerprint: the cache has"):
        list(check_experiment(read_experiment(file)))


def test_a_teacher_that_cannot_be_dumped_is_found(file: Path) -> None:
    teacher = Path(read_experiment(file).teacher.model)
    lines = list(check_experiment(read_experiment(file)))
    assert "teacher: 300 tokens, head language_model.lm_head.weight, images as 299" in lines
    config = json.loads((teacher / "config.json").read_text())
    config["text_config"]["dim_model_base"] = 256
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(StillhouseError, match="computes its logits in a way"):
        list(check_experiment(read_experiment(file)))


def test_a_setting_that_vllm_does_not_have_is_found(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse", "check", str(file), "teacher.settings.tensor_paralel_size=2"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "teacher.settings.tensor_paralel_size: vLLM has no such setting; did you mean tensor_par" in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.kd.splits=[trian]", r"stages\.kd\.splits names trian; data\.sources has train"),
        (
            "stages.kd.checkpoints={every: 1, splits: [vla]}",
            r"stages\.kd\.checkpoints\.splits names vla; data\.sources has train",
        ),
        ("ablations.runs={kd: {stage: kd}}", r"evaluation\.splits names test; data\.sources has train"),
        ("stages.kd.init=/nowhere", r"stages\.kd\.init is /nowhere, which is neither a directory"),
        ("stages.kd.evaluation_cache=/nowhere", r"stages\.kd\.evaluation_cache is /nowhere: no cache is there"),
        ("stages.kd.cache=/nowhere", r"stages\.kd\.cache is /nowhere: no cache is there, and this file makes none"),
        ("stages.kd.images=/nowhere", r"stages\.kd\.images is /nowhere: there is no such folder"),
        ("teacher.model=/nowhere", r"teacher\.model is /nowhere, which is neither a folder"),
        ("data.sources=[{path: /nowhere.json}]", r"/nowhere\.json"),
        ("stages.later.init=nowhere", r"stages\.later\.init is nowhere, which is neither a directory"),
    ],
)
def test_paths_that_nothing_will_make_are_refused(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(check_experiment(read_experiment(file, [override])))


def test_a_budget_is_compared_with_the_one_that_a_cache_was_made_by(file: Path) -> None:
    same, other = ([f"cache.budget={{gradient_error: {error}}}"] for error in (0.05, 0.1))
    identity = plan_dump(read_settings(file, same)).identity
    asked = {"gradient_error": 0.05, "rows": 8192, "samples": 64, "predicted": {"gradient_error": 0.04}}
    chosen = {**identity.selection["response"], "tau": 0.0123, "rounding_kl": 0.002, "budget": asked}
    made = identity.model_copy(update={"selection": {**identity.selection, "response": chosen}})
    CacheWriter.open(read_experiment(file).cache.path, made, ("response", "visual", "relation"))
    assert any("fits" in line and "add" not in line for line in check_experiment(read_experiment(file, same)))
    with pytest.raises(IdentityError) as refused:
        list(check_experiment(read_experiment(file, other)))
    assert "selection.response.budget.gradient_error: cache has 0.05, this run has 0.1" in str(refused.value)
    assert "tau" not in str(refused.value)  # which a budget has yet to choose


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("losses={response: {treatment: exact}}", r"stages\.kd\.losses: these losses read hidden, which is not dumped"),
        ("losses={cross_entropy: 0, preference: {}}", r"stages\.kd\.losses: these losses read sequence"),
        (
            "losses={response: {temperature: 2}}",
            r"kd\.losses\.response\.temperature is 2, but the cache stores the log-sum",
        ),
    ],
)
def test_losses_that_the_dump_will_not_serve_are_found(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(check_experiment(read_experiment(file, [f"stages.kd.{override}"])))
    experiment = read_experiment(file)
    CacheWriter.open(experiment.cache.path, plan_dump(read_settings(file)).identity, ("response", "visual"))
    with pytest.raises(ConfigError, match=message):  # nor does the cache that is there
        list(check_experiment(read_experiment(file, [f"stages.kd.{override}"])))


def test_a_stage_may_read_families_of_a_later_dump(file: Path) -> None:
    experiment = read_experiment(file)
    CacheWriter.open(experiment.cache.path, plan_dump(read_settings(file)).identity, ("response", "visual"))
    overrides = ["cache.families=[response, visual, hidden]", "stages.kd.losses={response: {treatment: exact}}"]
    list(check_experiment(read_experiment(file, overrides)))


def test_losses_of_an_ablation_are_checked(file: Path) -> None:
    runs = "ablations.runs={exact: {stage: kd, set: {losses.response.treatment: exact}}}"
    with pytest.raises(ConfigError, match=r"ablations\.runs\.exact: losses: these losses read hidden"):
        list(check_experiment(read_experiment(file, [runs, "evaluation.splits=[train]"])))


def test_experts_that_the_ranks_of_an_ablation_cannot_share_are_found(file: Path) -> None:
    runs = "ablations.runs={sparse: {stage: later, set: {expert_parallel: 2}}}"
    with pytest.raises(ConfigError, match=r"stages\.later\.expert_parallel is 2, which does not divide the 1 ranks"):
        list(check_experiment(read_experiment(file, [runs, "evaluation.splits=[train]"])))


def test_an_untested_architecture_is_named_and_a_refused_one_stops(file: Path) -> None:
    path = file.parent / "teacher" / "config.json"
    config = json.loads(path.read_text())
    lines = list(check_experiment(read_experiment(file)))
    assert not [line for line in lines if line.startswith("warning: teacher")]
    path.write_text(json.dumps({**config, "model_type": "llava_next"}))
    lines = list(check_experiment(read_experiment(file)))
    assert [line for line in lines if line.startswith("warning: teacher: a llava_next is untested in vLLM: ")]
    path.write_text(json.dumps({**config, "model_type": "paligemma"}))
    with pytest.raises(ConfigError, match=r"a paligemma cannot be a teacher with teacher\.backend: vllm"):
        list(check_experiment(read_experiment(file)))


def test_the_parameters_that_a_stage_trains_are_listed(file: Path) -> None:
    document = yaml.safe_load(file.read_text())

    def trains(**fields: Any) -> str:
        with_sections(file, stages={"kd": {**document["stages"]["kd"], **fields}})
        lines = list(check_experiment(read_experiment(file)))
        (line,) = (line for line in lines if line.startswith("stages.kd trains "))
        return line.removeprefix("stages.kd trains ")

    projector = r"projector [\d,]+ of [\d,]+ \(4 tensors: model\.multi_modal_projector\)"
    only = trains(train=["projector"])
    assert re.fullmatch(rf"vision none of [\d,]+, {projector}, llm none of [\d,]+, mlp none of [\d,]+", only), only
    mlp = trains(train=["mlp"])
    assert re.search(r"llm none of [\d,]+, mlp ([\d,]+) of \1 \(\d+ tensors\)$", mlp), mlp
    both = trains(train=["projector", "llm"])
    assert re.search(r"llm ([\d,]+) of \1 \(\d+ tensors\), mlp ([\d,]+) of \2 \(\d+ tensors\)$", both), both
    adapted = trains(train=["projector", "llm"], lora={})
    assert re.search(r"llm adapters beside its [\d,]+, mlp adapters beside its [\d,]+$", adapted), adapted


def test_a_checkpoint_that_a_stage_writes_or_the_hub_may_have_is_no_mistake(file: Path) -> None:
    for override in ("stages.later.init={run}/models/kd", "stages.kd.init=owner/name"):
        list(check_experiment(read_experiment(file, [override])))


def test_every_cache_of_a_stage_is_checked(file: Path) -> None:
    """The one to come, by its teacher; one that is there, as it is; one that is nowhere."""
    document = yaml.safe_load(file.read_text())
    here = Path(document["runs_dir"]) / "tiny" / "cache"
    there = make_cache(file.parent / "other", file.parent / "student", num_samples=2)
    stage = document["stages"]["kd"]
    stage["caches"] = [{"path": str(here)}, {"path": str(there), "weight": 2, "filter": [["num_images", "==", 1]]}]

    def lines() -> list[str]:
        file.write_text(yaml.safe_dump(document))
        return list(check_experiment(read_experiment(file)))

    *_, fits, _, unseen = lines()
    assert fits == f"stages.kd: {file.parent / 'student'} fits the teacher"
    assert unseen.startswith("not checked:")
    assert "stages.later" in unseen
    stage["caches"][0]["splits"] = ["typo"]
    with pytest.raises(ConfigError, match=r"stages\.kd\.caches\.0\.splits names typo"):
        lines()
    del stage["caches"][0]["splits"]
    stage["checkpoints"] = {"every": 1, "splits": ["test"]}  # of which only the second cache has samples
    document["evaluation"] = {"splits": ["test"]}
    document["ablations"] = {"runs": {"kd": {"stage": "kd"}}}
    lines()
    stage["checkpoints"]["splits"] = ["vla"]
    with pytest.raises(
        ConfigError, match=r"checkpoints\.splits names vla; data\.sources has train, other caches test, "
    ):
        lines()
    del stage["checkpoints"], document["evaluation"], document["ablations"]
    stage["caches"] = [{"path": str(there)}, {"path": str(file.parent / "nowhere")}]
    with pytest.raises(ConfigError, match=r"stages\.kd\.caches\.1\.path is .*nowhere: no cache is there"):
        lines()
    stage["caches"] = [{"path": str(there)}]
    stage["losses"] = {"response": {"treatment": "unbiased"}}
    with pytest.raises(ConfigError, match=r"other/cache: stages\.kd\.losses\.response\.treatment is 'unbiased'"):
        lines()
    stage["losses"], stage["filter"] = {}, [["entropy", "<", 1]]
    with pytest.raises(ConfigError, match="there is no column 'entropy'"):
        lines()


def test_a_clean_clone_is_checked_as_far_as_its_files_exist(tmp_path: Path) -> None:
    """No folder is made, and what `prepare` has yet to make is named."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse", "check", "pipeline.yaml", f"runs_dir={tmp_path / 'runs'}"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not checked yet: samples, prompts, teacher, cache and losses; examples/digits/make.py, which" in done.stdout
    assert f"has yet to make {tmp_path}/runs/digits/data/train.jsonl" in done.stdout
    assert not (tmp_path / "runs").exists()


def with_sections(file: Path, **sections: object) -> Path:
    document = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**document, **sections}))
    return file


def test_prepare_may_make_missing_files_but_its_script_must_exist(file: Path) -> None:
    script = file.parent / "make.py"
    with_sections(file, prepare={"script": str(script)})
    override = ["data.sources=[{path: '{run}/data/train.jsonl', split: train}]"]
    with pytest.raises(ConfigError, match=r"prepare\.script is .*make\.py, which is not a file"):
        list(check_experiment(read_experiment(file, override)))
    script.write_text("")
    assert "has yet to make" in list(check_experiment(read_experiment(file, override)))[-1]
    steps = read_experiment(file).run / "steps"
    steps.mkdir(parents=True)
    (steps / "prepare.json").write_text("{}")  # it ran, and did not make this
    with pytest.raises(ConfigError, match=r"data/train\.jsonl"):
        list(check_experiment(read_experiment(file, override)))


def test_an_untrained_teacher_is_checked_by_its_tokenizer(file: Path) -> None:
    document = yaml.safe_load(file.read_text())
    stages = {**document["stages"], "teacher": {
        "init": document["teacher"]["model"], "output": "{run}/models/teacher", "cache": "{run}/data/teacher_cache",
        "steps": 1,
    }}  # fmt: skip
    trained = {"stage": "teacher", "tokenizer": document["teacher"]["model"], "data": document["data"]}
    teacher = {**document["teacher"], "model": "{run}/models/teacher"}
    with_sections(file, stages=stages, train_teacher=trained, teacher=teacher)
    lines = list(check_experiment(read_experiment(file)))
    assert "samples: 4 in 1 parts" in lines
    assert any(line.startswith("not checked yet: whether the cache fits") for line in lines)
    assert any(line.endswith("student fits the teacher") for line in lines)


def test_a_module_that_a_student_lacks_is_found(file: Path) -> None:
    document = yaml.safe_load(file.read_text())
    make_teacher(file.parent / "decoder", "llama")
    document["stages"]["kd"]["init"] = str(file.parent / "decoder")
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match="a 'llama' has no projector; it has layers, llm, mlp"):
        list(check_experiment(read_experiment(file)))


def test_students_that_a_stage_or_a_run_prunes_are_checked(file: Path) -> None:
    teacher = read_experiment(file).teacher.model
    document = yaml.safe_load(file.read_text())
    prune = {"model": teacher, "layers": 1}
    document["stages"]["small"] = {"init": "{run}/small", "prune": prune, "steps": 1}
    document["stages"]["healed"] = {"init": "{run}/healed", "prune": {**prune, "model": "{run}/small"}, "steps": 1}
    document["evaluation"] = {"splits": ["train"]}
    document["ablations"] = {"runs": {"narrow": {"stage": "small", "set": {"init": "n", "prune.layers": 2}}}}
    file.write_text(yaml.safe_dump(document))
    lines = list(check_experiment(read_experiment(file)))
    assert f"stages.small: {teacher} can be pruned so" in lines
    assert f"ablations.runs.narrow: {teacher} can be pruned so" in lines
    assert not any("healed: " in line and "pruned" in line for line in lines)  # its model is yet to be made
    words = r"ablations\.runs\.narrow: prune\.layers is 3, but .* has only 2"
    with pytest.raises(ConfigError, match=words):
        list(check_experiment(read_experiment(file, ['ablations.runs.narrow.set={"prune.layers": 3}'])))
