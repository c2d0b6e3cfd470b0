"""The emoji experiment's YAML files: valid, with fair controls, and the long one goes on where the short one ended."""

from pathlib import Path

import pytest

from stillhouse.ablate import list_grid
from stillhouse.config import read_experiment

FOLDER = Path(__file__).parents[2] / "examples" / "emoji"
SHORT, LONG = (read_experiment(FOLDER / f"{name}.yaml") for name in ("pipeline", "long"))


@pytest.mark.parametrize("experiment", [SHORT, LONG], ids=["short", "long"])
def test_labels_and_teacher_differ_in_nothing_but_the_losses(experiment):
    for labels, teacher in [("sft", "dft"), ("sft_narrow", "dft_narrow")]:
        if labels in experiment.stages:
            sft, dft = (experiment.stages[name].model_dump(exclude={"losses"}) for name in (labels, teacher))
            assert sft == dft
            assert experiment.stages[teacher].losses.cross_entropy == 1
    assert experiment.stages["sft"].prune.layers == 8
    assert experiment.ablations.runs["sft_double"].set == {"steps": 2 * experiment.stages["sft"].steps}
    assert set(experiment.ablations.controls) <= set(experiment.ablations.runs)


def test_the_long_form_trains_the_short_ones_students_no_second_time():
    """A run is trained again where its stage, its evaluation, its data or its place differ."""
    assert LONG.run == SHORT.run
    assert LONG.cache == SHORT.cache
    assert LONG.teacher == SHORT.teacher
    assert LONG.data == SHORT.data
    assert LONG.evaluation == SHORT.evaluation
    long = {(run.name, run.seed): run for run in list_grid(LONG)}
    for run in list_grid(SHORT):
        assert long[run.name, run.seed] == run


def test_the_narrow_students_width_is_a_multiple_of_smollm2s_nine_heads():
    """transformers refuses another one, which `check` can only say once the teacher has been trained."""
    prune = LONG.stages["sft_narrow"].prune
    assert prune is not None
    assert prune.width is not None
    assert prune.width.hidden_size is not None
    assert prune.width.hidden_size % 9 == 0


def test_held_out_splits_are_never_trained_on():
    for experiment in (SHORT, LONG):
        assert {source.split for source in experiment.data.sources} == {"train", "validation", "test"}
        assert all(stage.splits == ("train",) for stage in experiment.stages.values())
        assert experiment.evaluation.splits == ("test",)
    assert SHORT.train_teacher is not None
    [train] = [source for source in SHORT.train_teacher.data.sources if source.split == "train"]
    assert train.path.endswith("teacher_train.jsonl")
