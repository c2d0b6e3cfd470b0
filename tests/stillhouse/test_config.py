"""The schema of a whole pipeline.yaml: valid experiments, overrides, and mistakes that are refused."""

from pathlib import Path

import pytest

from stillhouse.config import read_experiment
from storage.errors import ConfigError

DEFAULT = Path(__file__).parents[2] / "pipeline.yaml"


def test_default_experiment_is_valid_and_names_its_runs_and_controls():
    experiment = read_experiment(DEFAULT)
    controls = ["sft", "sft_double", "sft_best", "sft_teacher"]
    assert list(experiment.ablations.runs) == [*controls, "kd_response", "kd_full"]
    assert set(experiment.ablations.get_controls("kd_full")) == {*controls, "kd_response"}
    assert len(experiment.ablations.seeds) >= 5
    assert experiment.run == Path("runs/digits")
    assert experiment.cache.path == "runs/digits/cache"


def test_overrides_reach_into_sections():
    experiment = read_experiment(DEFAULT, ["name=other", "stages.sft.lr=1e-4"])
    assert experiment.stages["sft"].lr == 1e-4
    assert experiment.teacher.model == "runs/other/models/teacher"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.sft.lerning_rate=1", ["stages.sft.lerning_rate", "unknown field"]),
        ("stages.sft.lr=-1", ["stages.sft.lr", "-1"]),
        ("ablations.runs.sft.stage=sfft", ["ablations.runs.sft.stage", "sfft", "dft"]),
        ("ablations.runs.kd_full.set={losses.respnse: null}", ["respnse"]),
        ("ablations.controls=[nobody]", ["controls of", "nobody"]),
        ("ablations.seeds=[]", ["ablations.seeds"]),
        ("ablations.runs.sft.set={seed: 7}", ["sft.set has seed", "ablations.seeds"]),
        ("ablations.runs={../x: {stage: dft}}", ["'../x' cannot be the name of a run"]),
        ("ablations.seeds=[0, 0]", ["ablations.seeds", "must differ"]),
        ("cache.response.temperatures=[.inf]", ["cache.response.temperatures"]),
        ("teacher.model=elsewhere", ["stages.teacher.output", "teacher.model"]),
        ("tecaher.model=x", ["tecaher"]),
        (
            "more_caches={own: {set: {teacher.model: x}}}",
            ["more_caches.own.set", "'teacher.model'", "data, dump or cache"],
        ),
        ("more_caches={own: {set: {cache.path: x}}}", ["more_caches.own.set", "not cache.path"]),
        ("more_caches={own: {set: {cache.familes: []}}}", ["cache.familes", "unknown field"]),
        ("more_caches={../own: {set: {cache.families: []}}}", ["more_caches", "expected a name"]),
    ],
)
def test_a_mistake_is_refused_by_name(override, words):
    with pytest.raises(ConfigError) as caught:
        read_experiment(DEFAULT, [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_experiment_without_its_own_data_or_teacher_needs_neither_section(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text("teacher: {model: some/teacher}\ndata: {sources: [{path: mine.jsonl}]}\n")
    experiment = read_experiment(path)
    assert experiment.prepare is None
    assert experiment.train_teacher is None


def test_more_caches_are_the_first_one_with_fields_replaced() -> None:
    experiment = read_experiment(DEFAULT, ["more_caches={own: {set: {data.responses: teacher, cache.families: []}}}"])
    (path,) = experiment.more_caches
    assert path == "runs/digits/caches/own"
    other = read_experiment(DEFAULT, experiment.more_caches[path])
    assert (other.data.responses, other.cache.families, other.cache.path) == ("teacher", (), path)
    assert other.data.sources == experiment.data.sources
