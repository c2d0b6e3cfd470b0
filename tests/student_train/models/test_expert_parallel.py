"""Experts that are sharded among ranks train like whole ones, and give a standard checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from storage.errors import ConfigError
from student_train.models.checkpoint import save_checkpoint
from student_train.models.expert_parallel import check_experts, to_standard_names
from student_train.models.huggingface import import_transformers, load_weights
from student_train.models.sparse_upcycling import ExpertSettings, upcycle
from tests.student_train.caches import make_cache
from tests.student_train.conftest import Outcome, Runner
from tests.student_train.courses import assert_same_course, metrics
from tests.tiny import make_tiny_llava

LOSSES = {"response": {"weight": 0.5}, "balance": {"weight": 0.1, "z_weight": 0.01}}
ON_ONE = {"one": {}, "d2s": {"moe": {}}, "alone": {"expert_parallel": 2}, "dense": {"expert_parallel": 2}}
ON_TWO = {
    "whole": {},
    "zero1": {"expert_parallel": 2, "zero_stage": 1, "offload": ["optimizer"]},
    "zero2": {"expert_parallel": 2, "gradient_checkpointing": True},
    "zero3": {"expert_parallel": 2, "zero_stage": 3},
    "bf16": {"expert_parallel": 2, "precision": "bf16"},
    "d2s_of_two": {"expert_parallel": 2, "moe": {}},
}
ON_FOUR = {"four": {"expert_parallel": 2}}
Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, make_runner: Callable[..., Runner]
) -> tuple[Runner, dict[str, Outcome]]:
    """Stages of a sparse student on one rank, on two, and on four, two of which hold the same experts.

    Each forward pass sees the same samples however many ranks there are, for the balance is not linear in them. Few
    tokens are routed, so that hardly one stands where rounding decides between two experts.
    """
    folder = tmp_path_factory.mktemp("checkpoints")
    dense = make_tiny_llava(folder / "dense", num_layers=3)
    common = {
        "init": str(sparse(dense, folder / "sparse")), "cache": str(make_cache(folder, dense, families=("response",))),
        "losses": LOSSES, "train": ["projector", "mlp"], "module_lr": {"mlp": 1e-3}, "weight_decay": 0.1,
        "clip_norm": 0.5, "steps": 3, "global_batch": 8, "micro_batch": 2, "zero_stage": 2,
        "checkpoints": {"every": 2, "splits": ["test"], "samples": 8},
    }  # fmt: skip
    stages = {name: {**common, **own} for name, own in {**ON_ONE, **ON_TWO, **ON_FOUR}.items()}
    for name in ("d2s", "d2s_of_two", "dense"):
        stages[name]["init"] = str(dense)
    del stages["dense"]["losses"]
    runner = make_runner(**stages)
    found: dict[str, Outcome] = {}
    for ranks, names in ((1, ON_ONE), (2, ON_TWO), (4, ON_FOUR)):
        found |= zip(names, runner.run_in_turn(*((name,) for name in names), ranks=ranks), strict=True)
    return runner, found


def sparse(dense: Path, folder: Path) -> Path:
    """Save a student whose layers 0 and 2 have four different experts, selective routers, and a shared expert."""
    model = upcycle(load_weights(dense), ExpertSettings(4, 2, 2), seed=0)
    config = copy.deepcopy(model.config)
    config.text_config.shared_expert_intermediate_size = 16
    torch.manual_seed(0)
    other = import_transformers().AutoModelForImageTextToText.from_config(config)
    missing, _ = other.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if ".shared_expert." not in name}, strict=False
    )
    assert len(missing) == 2 * 3
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".mlp." in name and "language_model" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    return save_checkpoint(other, folder, dense)


@pytest.fixture(scope="module")
def trained(outcomes: tuple[Runner, dict[str, Outcome]]) -> Trained:
    """Returns the output folder of a stage."""
    runner, found = outcomes

    def output(stage: str) -> Path:
        assert found[stage].code == 0, found[stage].stderr
        return runner.output(stage)

    return output


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "other"),
    [("whole", "one"), ("zero1", "one"), ("zero2", "one"), ("zero3", "one"), ("four", "one"), ("d2s_of_two", "d2s")],
)
def test_sharded_experts_train_like_whole_ones(trained: Trained, stage: str, other: str) -> None:
    """Same losses, router statistics, held-out losses, gradient norms above clip_norm, weights and names."""
    assert_same_course(trained(stage), trained(other))
    line = metrics(trained(stage))[-1]
    assert line["grad_norm"] > 1
    assert {"balance", "router_z", "router_entropy", "expert_load_max", "held_out_balance"} <= line.keys()
    ours, theirs = (load_file(trained(name) / "model.safetensors") for name in (stage, other))
    for name, weight in ours.items():
        assert (weight - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
    summaries = [json.loads((trained(name) / "summary.json").read_text()) for name in (stage, other)]
    for name in ("num_parameters", "num_activated_parameters", "num_trained_parameters", "best"):
        assert summaries[0][name] == pytest.approx(summaries[1][name]), name


@pytest.mark.ci
@pytest.mark.slow
def test_every_expert_trains_and_what_is_frozen_stays(
    trained: Trained, outcomes: tuple[Runner, dict[str, Outcome]]
) -> None:
    runner, _ = outcomes
    before = load_file(Path(runner.document["stages"]["zero2"]["init"]) / "model.safetensors")
    after = load_file(trained("zero2") / "model.safetensors")
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    trains = {name for name in after if (".mlp." in name and "language_model" in name) or "projector" in name}
    assert moved == trains


@pytest.mark.ci
@pytest.mark.slow
def test_bf16_follows_fp32(trained: Trained) -> None:
    for low, full in zip(metrics(trained("bf16")), metrics(trained("one")), strict=True):
        assert low["loss"] == pytest.approx(full["loss"], rel=0.05)
        assert low["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.1)


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("alone", "stages.alone.expert_parallel is 2, which does not divide the 1 ranks of this run"),
        ("dense", "expert_parallel shards the experts of a sparse LLaVA, but "),
    ],
)
def test_expert_parallel_without_experts_to_shard_is_refused(
    outcomes: tuple[Runner, dict[str, Outcome]], stage: str, words: str
) -> None:
    _, found = outcomes
    assert found[stage].code == 2
    assert words in found[stage].stderr


def test_a_number_of_experts_that_ranks_do_not_divide_is_refused() -> None:
    check_experts(4, 2, student="x")
    with pytest.raises(ConfigError, match="expert_parallel is 3, which does not divide the 4 experts of x"):
        check_experts(4, 3, student="x")


def test_sharded_layers_get_their_standard_names() -> None:
    divided = {
        "router.gate.weight": 0, "gate.gate.weight": 0, "experts.w1": 1, "experts.w2": 2, "experts.w3": 3,
        "shared_experts.up_proj.weight": 4, "shared_experts_gate.weight": 5,
    }  # fmt: skip
    standard = {
        "gate.weight": [0, 0], "experts.gate_up_proj": [1, 1, 3, 3], "experts.down_proj": [2, 2],
        "shared_expert.up_proj.weight": [4, 4], "shared_expert_gate.weight": [5, 5],
    }  # fmt: skip
    others = {"layers.1.mlp.gate_proj.weight": torch.zeros(1), "layers.1.mlp.down_proj.weight": torch.ones(1)}
    found = to_standard_names(
        {f"layers.0.mlp.{name}": torch.full((1, 2), number) for name, number in divided.items()} | others
    )
    assert {name: tensor.flatten().tolist() for name, tensor in found.items()} == {
        **{f"layers.0.mlp.{name}": numbers for name, numbers in standard.items()},
        **{name: tensor.tolist() for name, tensor in others.items()},
    }
