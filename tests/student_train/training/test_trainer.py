from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import ConfigError
from student_train.config import StageSection
from student_train.training.trainer import compute_learning_rate, count_steps, resolve_stage


def stage(**fields: object) -> StageSection:
    return StageSection.model_validate({"init": "somewhere", **({} if "epochs" in fields else {"steps": 5}), **fields})


@given(total=st.integers(1, 300), warmup=st.floats(0, 1))
def test_the_learning_rate_rises_to_its_peak_then_falls(total: int, warmup: float) -> None:
    rates = [compute_learning_rate(step, num_steps=total, peak=2.0, warmup_fraction=warmup) for step in range(total)]
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(2.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_the_learning_rate_by_hand() -> None:
    rates = [compute_learning_rate(step, num_steps=6, peak=1.0, warmup_fraction=0.3) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_epochs_become_steps_that_cover_them() -> None:
    assert count_steps(stage(), 1000) == 5
    assert count_steps(stage(epochs=1, global_batch=32), 100) == 4
    assert count_steps(stage(epochs=0.01, global_batch=32), 100) == 1


def test_stage_and_seed_are_replaced_in_paths() -> None:
    got = resolve_stage(stage(init="models/{seed}", output="runs/{stage}/seed{seed}", seed=7), "kd")
    assert (got.init, got.output) == ("models/7", "runs/kd/seed7")


@pytest.mark.parametrize("init", ["runs/kd", "runs/kd/checkpoints/best", "runs/other/../kd"])
def test_a_stage_does_not_start_from_what_it_replaces(init: str) -> None:
    with pytest.raises(ConfigError, match=r"stages\.kd: init is .*inside the stage's own output runs/kd,"):
        resolve_stage(stage(init=init, output="runs/{stage}"), "kd")


@pytest.mark.parametrize("replaced", ["init", "output"])
@pytest.mark.parametrize(
    "making",
    [
        {"prune": {"model": "runs/teacher", "layers": 2}},
        {"compose": {"vision": "tower", "llm": "runs/other/../teacher", "processor": "models/x"}},
    ],
)
def test_a_stage_does_not_replace_what_its_init_is_made_from(replaced: str, making: dict[str, Any]) -> None:
    places = {"init": "runs/init", "output": "runs/out"} | {replaced: "runs/teacher"}
    with pytest.raises(ConfigError, match=r"stages\.kd: .*teacher is both what init is made from and the stage's init"):
        resolve_stage(stage(**places, **making), "kd")


def test_exactly_one_length_is_asked_for() -> None:
    with pytest.raises(ValueError, match="either steps or epochs"):
        StageSection(init="x")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"precision": "fp16", "zero_stage": 0}, "fp16 needs zero_stage 1, 2 or 3"),
        ({"offload": ["optimizer"], "zero_stage": 0}, "offload optimizer needs zero_stage 1, 2 or 3, but it is 0"),
        ({"offload": ["optimizer", "parameters"]}, "offload parameters needs zero_stage 3, but it is 2"),
        ({"module_lr": {"vision": 1e-6}}, "module_lr names vision, but train is projector, llm"),
        ({"train": ["mlp"], "module_lr": {"llm": 1e-6}}, "module_lr names llm, but train is mlp"),
        ({"train": ["projector"], "lora": {}}, "lora replaces the training of llm .* which is projector"),
        ({"train": ["llm", "mlp"], "lora": {}}, "lora replaces the training of llm .* which is llm, mlp"),
        ({"lora": {}, "moe": {}}, "lora adapts a dense decoder, but moe makes it sparse"),
        ({"ema": 0.99, "zero_stage": 3}, "ema needs whole weights on each rank"),
        ({"expert_parallel": 2, "zero_stage": 0}, "expert_parallel 2 needs zero_stage 1, 2 or 3"),
        ({"expert_parallel": 2, "lora": {}}, "expert_parallel 2 shards experts, but lora adapts a dense decoder"),
        ({"expert_parallel": 2, "ema": 0.9}, "expert_parallel 2 shards experts, but ema needs whole weights"),
        ({"expert_parallel": 2, "train": ["projector"]}, "shards trained experts, but train is projector"),
        ({"expert_parallel": 3, "moe": {}}, "expert_parallel 3 does not divide moe.experts, which is 4"),
        ({"expert_parallel": 2, "num_processes": 3}, "expert_parallel 2 does not divide num_processes, which is 3"),
        ({"checkpoints": {"every": 5, "keep_last": 0}}, "checkpoints keeps no checkpoint"),
        ({"checkpoints": {"every": 5, "splits": ["train", "val"]}}, "held out, but train is trained on"),
        (
            {
                "caches": [{"path": "a"}, {"path": "b", "splits": ["val"]}],
                "checkpoints": {"every": 5, "splits": ["val"]},
            },
            "held out, but val is trained on",
        ),
        (
            {"checkpoints": {"every": 5, "splits": ["val"], "metric": "response"}},
            "metric is 'response'; this stage has loss, cross_entropy",
        ),
    ],
)
def test_invalid_combinations_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stage(**fields)


def test_a_part_of_a_trained_module_may_have_its_own_learning_rate() -> None:
    assert stage(module_lr={"mlp": 1e-4}).module_lr == {"mlp": 1e-4}
