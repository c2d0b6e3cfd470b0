"""LLaVA-MoD's stages: a sparse student's losses, preference pairs, and all stages from dense to preference."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from storage.errors import ConfigError
from storage.reader.cache import Cache
from student_train.config import EvaluationSection, MoeSection, SourceSection, StageSection
from student_train.data.batch_schedule import plan_micro_batches
from student_train.data.collate import collate
from student_train.data.sample_images import TensorStore, VisionGatherer, open_images
from student_train.evaluation.model_evaluation import evaluate_model
from student_train.losses.config import LossesSection, PreferenceLossSection
from student_train.losses.load_balancing import router_losses
from student_train.losses.preference import Rewards, preference_loss
from student_train.losses.row_counts import RowCounts
from student_train.models.loading import freeze, load_student
from student_train.models.sparse_upcycling import ExpertSettings, upcycle
from student_train.models.student import Student
from student_train.training.objective import Objective, list_part_names
from student_train.training.stage_data import StageData, load_cached_teacher, prepare_stage_data
from tests.student_train.caches import join_records, make_cache
from tests.student_train.conftest import Runner
from tests.tiny import make_tiny_llava

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("dense") / "llava", num_layers=2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    return make_cache(tmp_path_factory.mktemp("pairs"), dense, num_samples=16, families=("response", "sequence"))


def objective_of(stage_data: StageData, losses: dict, *, sparse: bool = False) -> tuple[Objective, VisionGatherer]:
    model = load_student(stage_data.checkpoint, precision="fp32", device=CPU)
    if sparse:
        model = upcycle(model, ExpertSettings(4, 2, 1), seed=0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in model.model.language_model.layers:
                layer.mlp.gate.weight += torch.randn(layer.mlp.gate.weight.shape, generator=generator)
    freeze(model, ("projector", "llm"))
    identity = stage_data.cache.identity
    student = Student(model, vocab_size=identity.vocab_size, image_token_id=identity.image_token_id, features=None)
    folder = open_images(stage_data.cache, None, stage_data.checkpoint.image_processor)
    section = LossesSection.model_validate(losses)
    objective = Objective(student, section, load_cached_teacher(stage_data, section), chunk_logits=300 * 7)
    return objective, VisionGatherer(folder, features=None, pixels=TensorStore(0))


def summed(stage_data: StageData, losses: dict, *, ranks: int, micro: int, sparse: bool = False) -> tuple[dict, dict]:
    """Return the parts, summed over ranks and micro-batches of one global batch of 6, and the gradients."""
    objective, vision = objective_of(stage_data, losses, sparse=sparse)
    families = ("sequence",) if "preference" in losses else ()
    totals: dict[str, float] = {}
    for rank in range(ranks):
        for plan in plan_micro_batches(stage_data.table, 6, micro, steps=range(1), seed=1, rank=rank, num_ranks=ranks):
            samples = stage_data.cache.read_many(stage_data.table.indices[plan.rows].ravel())
            batch = collate(
                samples, stage_data.checkpoint.sequence_format, vision.gather, families=families, counted=plan.counted
            )
            parts = objective(batch, plan.totals, plan.largest)
            parts["loss"].backward()
            for name, value in parts.items():
                totals[name] = totals.get(name, 0) + value.item()
    named = objective.named_parameters()
    return totals, {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize(
    "section", [{}, {"kind": "dpo", "label_smoothing": 0.1}, {"kind": "ipo"}], ids=["kto_pair", "dpo", "ipo"]
)
def test_preference_agrees_with_a_slow_reference_however_a_batch_is_split(dense: Path, pairs: Path, section) -> None:
    losses = {"cross_entropy": 0, "preference": section}
    stage = StageSection(init=str(dense), steps=1, losses=LossesSection.model_validate(losses))
    stage_data = prepare_stage_data(stage, str(pairs))
    assert stage_data.table.indices.shape == (8, 2)  # of `train`
    totals, gradients = summed(stage_data, losses, ranks=1, micro=6)
    for ranks, micro in ((1, 2), (2, 3), (7, 1)):  # 7 ranks: one has no pair
        others, other_gradients = summed(stage_data, losses, ranks=ranks, micro=micro)
        assert others == pytest.approx(totals, rel=1e-5, abs=1e-5)
        for name, gradient in gradients.items():
            largest = float(gradient.abs().max())  # rounding is relative to what is summed, not to the sum
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest)
    ratios = []
    objective, vision = objective_of(stage_data, losses)
    (plan,) = plan_micro_batches(stage_data.table, 6, 6, steps=range(1), seed=1, rank=0, num_ranks=1)
    for index in stage_data.table.indices[plan.rows].flat:
        record = stage_data.cache.read(int(index))
        batch = collate(join_records([record]), stage_data.checkpoint.sequence_format, vision.gather)
        with torch.no_grad():
            hidden = objective.student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
            logits = objective.student.compute_logits(hidden)[:, :300].double()
        ids, mask = batch.input_ids[0], np.flatnonzero(record.tokens.response_mask) + 15  # the image took 16 places
        logprob = sum(logits[place - 1].log_softmax(0)[ids[place]] for place in mask.tolist())
        assert record.sequence is not None
        ratios.append(logprob - record.sequence.logprob)
    chosen, rejected = torch.stack(ratios).view(-1, 2).T
    rewards = Rewards(chosen, rejected)
    expected = preference_loss(rewards, PreferenceLossSection.model_validate(section)).item() / 6
    assert totals["preference"] == pytest.approx(expected, rel=1e-5)
    assert totals["loss"] == pytest.approx(expected, rel=1e-5)
    assert totals["preference_margin"] == pytest.approx(rewards.margin.item() / 6, rel=1e-4)
    assert totals["preference_won"] == pytest.approx(rewards.num_won.item() / 6)


def test_balance_is_added_once_and_twice_with_literal(dense: Path, pairs: Path) -> None:
    stage = StageSection(init=str(dense), steps=1)
    stage_data = prepare_stage_data(stage, str(pairs))
    totals, _ = summed(stage_data, {"balance": {}}, ranks=1, micro=6, sparse=True)
    assert tuple(totals) == ("loss", *list_part_names(LossesSection.model_validate({"balance": {}})))
    assert totals["loss"] == pytest.approx(totals["cross_entropy"] + 0.01 * totals["balance"], rel=1e-6)
    literal, _ = summed(stage_data, {"balance": {"literal": True}}, ranks=1, micro=6, sparse=True)
    assert literal["loss"] == pytest.approx(totals["cross_entropy"] + 0.02 * literal["balance"], rel=1e-6)
    assert literal["balance"] != pytest.approx(totals["balance"], rel=1e-3)  # of first choices alone
    assert 0 <= totals["expert_load_min"] <= 0.25 <= totals["expert_load_max"] <= 0.5
    assert totals["balance"] >= 2 * 1 - 0.1  # two layers


def test_literal_balance_of_pairs_is_added_side_by_side_and_averaged_over_micro_batches(
    dense: Path, pairs: Path
) -> None:
    """A slow reference by answer: E * sum_i (share of first choices) * (mean gate), chosen plus rejected."""
    losses = {"cross_entropy": 0, "preference": {}, "balance": {"literal": True}, "mean": "micro_batch"}
    section = LossesSection.model_validate(losses)
    stage = StageSection(init=str(dense), steps=1, group_by_length=False, moe=MoeSection(), losses=section)
    stage_data = prepare_stage_data(stage, str(pairs))
    totals, _ = summed(stage_data, losses, ranks=1, micro=1, sparse=True)
    objective, vision = objective_of(stage_data, losses, sparse=True)
    (plan,) = plan_micro_batches(stage_data.table, 6, 6, steps=range(1), seed=1, rank=0, num_ranks=1)
    expected = 0.0
    for index in stage_data.table.indices[plan.rows].flat:
        batch = collate(stage_data.cache.read_many([int(index)]), stage_data.checkpoint.sequence_format, vision.gather)
        with torch.no_grad():
            _, routers = objective.student.compute_hidden_and_routers(
                batch.input_ids, batch.visual_positions, batch.vision
            )
        for layer in routers:
            gates = layer.double().softmax(1)
            first = torch.nn.functional.one_hot(gates.argmax(1), gates.shape[1]).double()
            expected += float(gates.shape[1] * (first.mean(0) * gates.mean(0)).sum()) / 6  # micro-batches
    assert totals["balance"] == pytest.approx(expected, rel=1e-5)
    assert totals["loss"] == pytest.approx(totals["preference"] + 0.02 * totals["balance"], rel=1e-5)


def test_balance_leaves_padding_out_and_is_the_mean_over_samples(dense: Path, pairs: Path) -> None:
    """A slow reference: one sample at a time, without padding, as in micro-batches of one."""
    stage_data = prepare_stage_data(StageSection(init=str(dense), steps=1), str(pairs))
    totals, _ = summed(stage_data, {"balance": {}}, ranks=2, micro=1, sparse=True)
    objective, vision = objective_of(stage_data, {"balance": {}}, sparse=True)
    (plan,) = plan_micro_batches(stage_data.table, 6, 6, steps=range(1), seed=1, rank=0, num_ranks=1)
    values = []
    for index in stage_data.table.indices[plan.rows]:
        batch = collate(stage_data.cache.read_many([int(index)]), stage_data.checkpoint.sequence_format, vision.gather)
        with torch.no_grad():
            _, routers = objective.student.compute_hidden_and_routers(
                batch.input_ids, batch.visual_positions, batch.vision
            )
        values.append(router_losses(routers, torch.ones(len(routers[0]), dtype=torch.bool), top_k=2).balance.item())
    assert totals["balance"] == pytest.approx(np.mean(values), rel=1e-5)


def test_the_published_mask_misses_the_first_token_of_every_answer(dense: Path, pairs: Path) -> None:
    losses = {"cross_entropy": 0.5, "response": {"weight": 2.0}}
    literal = {**losses, "unshifted_mask": True}
    stage = StageSection(init=str(dense), steps=1, losses=LossesSection.model_validate(losses))
    stage_data = prepare_stage_data(stage, str(pairs))
    objective, vision = objective_of(stage_data, losses)
    unshifted, _ = objective_of(stage_data, literal)
    samples = stage_data.cache.read_many(stage_data.table.indices[:5])
    batch = collate(samples, stage_data.checkpoint.sequence_format, vision.gather, families=("response",))
    counts = batch.response_counts
    first = counts.cumsum(0) - counts  # rows, one an answer
    assert batch.response is not None
    alone = replace(
        batch,
        response_positions=batch.response_positions[first],
        labels=batch.labels[first],
        response=batch.response[first],
        response_counts=torch.ones_like(counts),
    )
    totals = RowCounts(response=int(counts.sum()), visual=0, relation=0, samples=5)
    whole, published, missed = (
        each(of, totals, totals) for each, of in ((objective, batch), (unshifted, batch), (objective, alone))
    )
    assert missed["response"] > 0
    assert published["response"].item() == pytest.approx((whole["response"] - missed["response"]).item(), rel=1e-4)
    assert published["cross_entropy"] == whole["cross_entropy"]  # labels are shifted as they must be
    assert published["loss"].item() == pytest.approx(
        0.5 * published["cross_entropy"].item() + 2 * published["response"].item(), rel=1e-5
    )
    # Answers of one token: nothing of the teacher arrives.
    objective_of_one, _ = objective_of(stage_data, {**literal, "cross_entropy": 0})
    nothing = objective_of_one(alone, totals, totals)
    nothing["loss"].backward()
    assert nothing["response"] == 0
    assert not any(p.grad.any() for p in objective_of_one.parameters() if p.grad is not None)


def test_an_unshifted_mask_without_a_response_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="unshifted_mask"):
        LossesSection.model_validate({"unshifted_mask": True})


def test_a_cache_without_pairs_is_refused(dense: Path, cache: Path) -> None:
    losses = LossesSection.model_validate({"cross_entropy": 0, "preference": {}})
    stage = StageSection(init=str(dense), steps=1, losses=losses)
    with pytest.raises(Exception, match="sequence"):
        prepare_stage_data(stage, str(cache))


def test_preference_with_other_losses_is_refused() -> None:
    with pytest.raises(ValueError, match="cross_entropy: 0"):
        LossesSection.model_validate({"preference": {}})


def test_balance_of_a_dense_student_is_refused(dense: Path, pairs: Path) -> None:
    stage = StageSection(init=str(dense), steps=1, losses=LossesSection.model_validate({"balance": {}}))
    with pytest.raises(ConfigError, match="balance"):
        prepare_stage_data(stage, str(pairs))


@pytest.mark.ci
@pytest.mark.slow
def test_from_dense_to_sparse_to_preference(make_runner: Callable[..., Runner], dense: Path, pairs: Path) -> None:
    """Three stages, each from the checkpoint of the one before; the last gives the same on two ranks as on one."""
    runner = make_runner(
        d2d={"init": str(dense), "cache": str(pairs), "losses": {"cross_entropy": 0, "response": {}}},
        d2s={
            "init": "{run}/d2d-0", "cache": str(pairs), "moe": {"experts": 4, "top_k": 2, "every": 2},
            "train": ["projector", "mlp"], "losses": {"response": {}, "balance": {}},
        },
        preference={
            "init": "{run}/d2s-0", "cache": str(pairs), "train": ["projector", "mlp"], "global_batch": 6,
            "micro_batch": 6, "zero_stage": 2,
            "losses": {"cross_entropy": 0, "preference": {"kl_reference": "global"}, "balance": {}},
        },
    )  # fmt: skip
    for outcome in runner.run_in_turn(("d2d",), ("d2s",), ("preference",)):
        assert outcome.code == 0, outcome.stderr
    dense_weights, sparse, preferred = (
        load_file(runner.output(stage) / "model.safetensors") for stage in ("d2d", "d2s", "preference")
    )
    attention = [name for name in dense_weights if "language_model" in name and ".mlp." not in name]
    assert attention
    for name in attention:  # attention, embeddings, norms and head stay as they were
        assert torch.equal(dense_weights[name], sparse[name]), name
        assert torch.equal(dense_weights[name], preferred[name]), name
    moved = {name for name in sparse if not torch.equal(sparse[name], preferred[name])}
    trained = {name for name in sparse if ("language_model" in name and ".mlp." in name) or "projector" in name}
    assert moved <= trained
    assert all(".experts." in name for name in trained - moved)  # an expert that saw no token stays as it was
    assert any(".mlp.gate.weight" in name for name in moved)
    summaries = [json.loads((runner.output(stage) / "summary.json").read_bytes()) for stage in ("d2d", "d2s")]
    mlp = sum(w.numel() for name, w in dense_weights.items() if "language_model.model.layers.0.mlp." in name)
    router = sparse["language_model.model.layers.0.mlp.gate.weight"].numel()
    total = summaries[0]["num_parameters"]
    assert summaries[0]["num_activated_parameters"] == total
    assert summaries[1]["num_parameters"] == total + 3 * mlp + router
    assert summaries[1]["num_activated_parameters"] == total + mlp + router  # two of four experts
    sources = [SourceSection(path=str(pairs))]
    judged = evaluate_model(runner.output("d2s"), sources, EvaluationSection(max_new_tokens=2, batch=5))
    cached = Cache.open(pairs)
    records = [cached.read(index).tokens for index, split in enumerate(cached.splits) if split == "test"]
    assert judged["routers"]["num_tokens"] == sum(len(each.token_ids) + 15 for each in records)  # an image takes 16
    ((*load,),) = judged["routers"]["load"]
    assert len(load) == 4
    assert sum(load) == pytest.approx(1)
    assert max(load) <= 0.5
    lines = [json.loads(line) for line in (runner.output("preference") / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["preference"] < lines[0]["preference"]
    # One forward pass of six pairs, or two ranks of three, which may divide the experts: the reference set is the same.
    ours = {name: f"stages.preference.output={{run}}/{name}-0" for name in ("two", "divided")}
    divided = runner.run_in_turn(
        ("preference", ours["two"]), ("preference", ours["divided"], "stages.preference.expert_parallel=2"), ranks=2
    )
    for stage, outcome in zip(ours, divided, strict=True):
        assert outcome.code == 0, outcome.stderr
        of_two = json.loads((runner.output(stage) / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("preference", "preference_won", "preference_margin"):
            assert of_two[name] == pytest.approx(lines[0][name], rel=1e-5, abs=1e-6)
