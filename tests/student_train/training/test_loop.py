"""The checkpoints and logs that a stage keeps, and its behaviour when its loss explodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from student_train.config import StageSection
from student_train.models.huggingface import import_transformers
from student_train.training.checkpoint_rotation import CheckpointRotation
from student_train.training.loop import compute_dropout_seed
from tests.student_train.conftest import Outcome, Runner
from tests.student_train.courses import metrics

LOSSES = {"response": {}, "visual": {"weight": 0.5}}
LORA = {"rank": 4, "alpha": 6, "dropout": 0.1}
Outcomes = dict[str, Outcome]


@pytest.fixture(scope="module")
def runner(make_runner: Callable[..., Runner]) -> Runner:
    common = {"losses": LOSSES, "micro_batch": 5, "zero_stage": 1}
    keeping = {"steps": 7, "checkpoints": {"every": 3, "splits": ["test"], "samples": 24}, "ema": 0.9}
    best = "{run}/kept-0/checkpoints/best"
    return make_runner(
        kept={**common, **keeping},
        # One step over all held-out samples, from the checkpoint that was kept for its held-out loss.
        again={**common, "init": best, "splits": ["test"], "global_batch": 24, "steps": 1},
        adapted={**common, "lora": LORA, "module_lr": {"projector": 1e-3}, "zero_stage": 3},
        exploding={
            **common, "losses": {}, "steps": 1500, "warmup_fraction": 1.0, "lr": 15.0, "explosion_factor": 1.5,
            "clip_norm": 1e9, "log_every": 50, "global_batch": 6, "micro_batch": 6, "track": [],
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(runner: Runner) -> Outcomes:
    names = list(runner.document["stages"])
    return dict(zip(names, runner.run_in_turn(*((name,) for name in names)), strict=True))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_the_best_checkpoint_is_the_one_of_the_smallest_held_out_loss(runner: Runner, outcomes: Outcomes) -> None:
    assert outcomes["kept"].code == 0, outcomes["kept"].stderr
    lines = metrics(runner.output("kept"))
    held_out = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert list(held_out) == [3, 6, 7]
    assert all("held_out_response" in line for line in lines if line["step"] in held_out)
    best = min(held_out, key=lambda step: held_out[step])
    assert summary(runner.output("kept"))["best"] == {"step": best, "metric": "loss", "value": held_out[best]}
    folders = {path.name for path in (runner.output("kept") / "checkpoints").iterdir()}
    assert folders == {"best", "step-00000006"}


def test_a_held_out_loss_is_that_of_the_kept_checkpoint_itself(runner: Runner, outcomes: Outcomes) -> None:
    assert outcomes["again"].code == 0, outcomes["again"].stderr
    (line,) = metrics(runner.output("again"))
    assert line["loss"] == pytest.approx(summary(runner.output("kept"))["best"]["value"], rel=1e-5)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, *[model.config.image_token_id] * 16, 7, 8, 9]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, pixel_values=pixels).logits


def test_adapters_are_merged_into_the_checkpoint_and_kept_beside_it(
    runner: Runner, outcomes: Outcomes, checkpoint: Path
) -> None:
    from peft import PeftModel

    assert outcomes["adapted"].code == 0, outcomes["adapted"].stderr
    folder = runner.output("adapted")
    load = import_transformers().AutoModelForImageTextToText.from_pretrained
    merged, info = load(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = load(checkpoint)
    before = logits(base)
    assert (logits(merged) - before).abs().max() > 1e-3
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)
    ours, theirs = merged.state_dict(), load(checkpoint).state_dict()
    moved = {name for name, weight in ours.items() if not torch.equal(weight, theirs[name])}
    assert {name.split(".")[-2] for name in moved if "language_model" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {name.split(".")[1] for name in moved} == {"language_model", "multi_modal_projector"}
    sizes = [tensor.numel() for tensor in load_file(folder / "adapter" / "adapter_model.safetensors").values()]
    assert summary(folder)["num_trained_parameters"] == sum(sizes)


@pytest.mark.parametrize("best", [("best", "best.tmp-1-ab"), ("best.tmp-1-ab", "best.tmp-1-ab-old")])
def test_a_resumed_run_deletes_later_and_incomplete_checkpoints(best: tuple[str, str], tmp_path: Path) -> None:
    """But restores the best one, which a kill between two renames left under another name."""
    names = [*best, "step-00000002", "step-00000002.tmp-1-cd-old", "step-00000004", "step-00000006"]
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    engine: Any = SimpleNamespace(process=SimpleNamespace(is_first=True))
    stage = StageSection.model_validate({"init": "none", "steps": 8, "output": str(tmp_path)})
    CheckpointRotation(engine, None, stage).delete_stale(4)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["best", "step-00000002", "step-00000004"]


def test_an_output_that_cannot_be_created_is_refused_by_name(
    make_runner: Callable[..., Runner], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (done,) = make_runner(first={"output": str(tmp_path / "file" / "out")}).run_in_turn(("first",))
    assert done.code == 2, done.stderr
    assert "stages.first.output, " in done.stderr
    assert "Not a directory" in done.stderr


@pytest.mark.parametrize("seed", [0, 20261125, 2**64 - 1])
def test_dropout_has_another_seed_in_every_step_and_rank(seed: int) -> None:
    seeds = {compute_dropout_seed(seed, step, rank) for step in (1, 2, 70_000) for rank in (0, 1)}
    assert len(seeds) == 6
    for each in seeds:
        torch.manual_seed(each)


def test_a_loss_that_explodes_stops_the_stage_and_records_the_samples(runner: Runner, outcomes: Outcomes) -> None:
    done = outcomes["exploding"]
    assert done.code == 1, done.stderr
    assert "explosion_factor" in done.stderr
    document = json.loads((runner.output("exploding") / "diverged-0.json").read_text())
    assert document["loss"] > document["limit"] > 0
    assert document["step"] > 50
    (micro,) = document["micro_batches"]
    assert len(micro["sample_ids"]) == 6
    assert all(name.startswith("train-") for name in micro["sample_ids"])
    assert micro["parts"]["loss"] == pytest.approx(document["loss"])
    assert not (runner.output("exploding") / "model.safetensors").exists()
