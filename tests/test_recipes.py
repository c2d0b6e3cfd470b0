"""The recipes for GPUs: read by the same schemas as any experiment, and true to the papers' numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.config import read_experiment
from student_train.models.loading import is_hub_id

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_experiment(path: Path) -> None:
    experiment = read_experiment(path)
    assert experiment.name == path.stem
    made = {stage.output.replace("{stage}", name) for name, stage in experiment.stages.items()}
    for stage in experiment.stages.values():
        assert stage.compose is not None or stage.init in made or is_hub_id(stage.init)
        assert stage.warmup_fraction == 0.03
        assert stage.weight_decay == 0
        assert set(stage.splits) <= {source.split for source in experiment.data.sources}
        read = {family for family in ("response", "visual", "relation") if getattr(stage.losses, family)}
        assert read <= set(experiment.cache.families)
    assert experiment.teacher.max_length == (10240 if "onevision" in path.stem else 2048)


def test_llava_kd_is_the_papers() -> None:
    stages = read_experiment(RECIPES[1]).stages
    assert RECIPES[1].stem == "llava_kd_qwen2.5_0.5b"
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
    experiment = read_experiment(RECIPES[0])
    assert RECIPES[0].stem == "llava_kd_onevision_0.5b"
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


def test_llava_mod_is_the_papers() -> None:
    stages = read_experiment(RECIPES[3]).stages
    assert RECIPES[3].stem == "llava_mod_qwen2_0.5b"
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
