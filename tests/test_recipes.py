"""The recipes for GPUs: read by the same schemas as any experiment, and true to the papers' numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.config import Experiment, read_experiment
from student_train.losses.config import LossesSection
from student_train.models.loading import is_hub_id

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
KD = {"qwen1.5_0.5b": "4b", "qwen1.5_1.8b": "4b", "qwen2.5_0.5b": "3b", "qwen2.5_1.5b": "3b"}  # student: its teacher
MOD = ("qwen1.5_0.5b", "qwen1.5_1.8b", "qwen2_0.5b", "qwen2_1.5b")


def read_recipe(name: str) -> Experiment:
    return read_experiment(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_experiment(path: Path) -> None:
    experiment = read_experiment(path)
    assert experiment.name == path.stem
    made = {stage.output.replace("{stage}", name) for name, stage in experiment.stages.items()}
    for stage in experiment.stages.values():
        assert stage.compose is not None or stage.init in made or is_hub_id(stage.init)
        assert stage.warmup_fraction == 0.03
        assert stage.weight_decay == 0
        assert set(stage.splits) <= set(experiment.data.published_rows)
        read = {family for family in ("response", "visual", "relation") if getattr(stage.losses, family)}
        assert read <= set(experiment.cache.families)
    own_lengths = {"llava_kd_onevision_0.5b": 10240, "qwen3_vl_2b": 4096, "qwen2.5_vl_3b": 4096, "smolvlm2_256m": 4096}
    assert experiment.teacher.max_length == own_lengths.get(path.stem, 2048)
    assert experiment.data.too_long == "cut_answer"
    assert all(source.dataset for source in experiment.data.sources)
    if experiment.teacher.recipe is not None:  # it makes this teacher, of the tokens and images that the students have
        recipe = read_experiment(FOLDER / experiment.teacher.recipe)
        assert experiment.teacher.model in [stage.output for stage in recipe.stages.values()]
        theirs, ours = (next(iter(each.stages.values())).compose for each in (recipe, experiment))
        assert theirs is not None
        assert ours is not None
        assert (ours.vision, ours.feature_layer, ours.select) == (theirs.vision, theirs.feature_layer, theirs.select)
        assert ours.processor == experiment.teacher.model
        assert theirs.template == ("llava_kd" if "kd" in path.stem else "llava_mod")
        assert theirs.pad_to_square == ("mod" in path.stem)


@pytest.mark.parametrize("student", KD)
def test_llava_kd_is_the_papers(student: str) -> None:
    experiment = read_recipe(f"llava_kd_{student}")
    stages = experiment.stages
    assert [source.template for source in experiment.data.sources] == ["caption", "chat"]
    compose = stages["dpt"].compose
    assert compose is not None
    family, size = student.split("_")
    assert compose.llm == f"Qwen/{family.capitalize()}-{size.upper()}"  # the base model
    assert experiment.teacher.recipe == f"teacher_siglip_{family}_{KD[student]}.yaml"
    assert [(name, stage.lr, stage.global_batch, stage.zero_stage) for name, stage in stages.items()] == [
        ("dpt", 1e-3, 256, 2), ("sft", 2e-5, 128, 3), ("dft", 2e-5, 128, 3),
    ]  # fmt: skip
    losses = stages["dpt"].losses
    assert losses.response is not None
    assert losses.visual is not None
    assert losses.relation is not None
    weights = (losses.cross_entropy, losses.response.weight, losses.visual.weight, losses.relation.weight)
    assert weights == (1.0, 1.0, 1.0, 0.5)
    assert stages["sft"].losses.response is None


def test_a_pair_of_the_hub_is_distilled_from_its_trained_student() -> None:
    experiment = read_recipe("llava_kd_onevision_0.5b")
    assert experiment.teacher.model == "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    assert list(experiment.stages) == ["dpt", "sft", "dft"]
    dpt, sft, dft = experiment.stages.values()
    assert dpt.init == sft.init == "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
    assert dft.init == dpt.output.replace("{stage}", "dpt")
    assert (dpt.train, dft.train) == (("projector",), ("projector", "llm"))
    assert sft.losses.response is None
    assert dft.losses == dpt.losses
    assert dft.losses.visual is not None
    assert (sft.splits, sft.global_batch, sft.lr) == (dft.splits, dft.global_batch, dft.lr)  # a control


@pytest.mark.parametrize("student", MOD)
def test_llava_mod_is_the_papers(student: str) -> None:
    experiment = read_recipe(f"llava_mod_{student}")
    stages = experiment.stages
    assert experiment.data.published_rows == {"captions": 600_000, "d2d": 2_400_000, "d2s": 1_400_000, "pairs": 80_000}
    (captions,) = experiment.more_caches  # no loss of theirs reads a teacher
    assert stages["init"].cache == captions
    assert "cache.families=[]" in experiment.more_caches[captions]
    compose = stages["init"].compose
    assert compose is not None
    family, size = student.split("_")
    assert compose.llm == f"Qwen/{family.capitalize()}-{size.upper()}"  # the base model
    assert [(stage.lr, stage.global_batch) for stage in stages.values()] == [
        (1e-3, 256), (2e-5, 128), (2e-5, 128), (2e-6, 128),
    ]  # fmt: skip
    assert list(stages) == ["init", "d2d", "d2s", "preference"]
    moe, preference = stages["d2s"].moe, stages["preference"].losses.preference
    assert moe is not None
    assert (moe.experts, moe.top_k, moe.every) == (4, 2, 2)
    assert stages["d2d"].losses.cross_entropy == 0
    assert stages["d2s"].train == ("projector", "mlp")
    assert preference is not None
    assert stages["preference"].offload == ("optimizer",)
    assert (preference.kind, preference.beta, preference.kl_reference) == ("kto_pair", 0.1, "pair")
    assert stages["preference"].losses.balance is not None


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path.stem.startswith("teacher_")], ids=lambda path: path.stem
)
def test_a_teacher_is_trained_with_labels_alone(path: Path) -> None:
    experiment = read_experiment(path)
    assert experiment.cache.families == ()
    init, sft = experiment.stages.values()
    assert init.compose is not None
    assert init.compose.processor is None
    assert experiment.teacher.model == init.init  # whose tokenizer and template prepare the samples
    assert [(stage.lr, stage.global_batch, stage.train) for stage in (init, sft)] == [
        (1e-3, 256, ("projector",)), (2e-5, 128, ("projector", "llm")),
    ]  # fmt: skip
    assert all(each.losses == LossesSection() for each in (init, sft))


@pytest.mark.parametrize("name", ["qwen3_vl_2b", "qwen2.5_vl_3b", "smolvlm2_256m"])
def test_pairs_of_today_have_a_control_and_no_rows_that_do_not_fit(name: str) -> None:
    experiment = read_recipe(name)
    sft, dft = experiment.stages.values()
    assert sft == dft.model_copy(update={"losses": sft.losses})
    assert is_hub_id(experiment.teacher.model)
    assert is_hub_id(dft.init)
    assert dft.losses.response is not None
    assert (dft.losses.visual is None) == (name == "smolvlm2_256m")  # 81 and 64 visual tokens a tile
    assert dft.losses.relation is None
