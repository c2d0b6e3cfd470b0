"""The published objective, a mean over micro-batches of their means, compared with formulas on whole logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from student_train.config import StageSection
from student_train.data.sample_images import open_images
from student_train.losses.averaging import WeightedRows, weigh_images, weigh_rows
from student_train.losses.config import LossesSection
from student_train.losses.row_counts import RowCounts
from student_train.losses.sparse_divergence import LossSpec
from student_train.training.stage_data import StageData, prepare_stage_data
from tests.student_train.references import sparse_loss
from tests.student_train.training.test_objective import Run

LOSSES = {"response": {}, "visual": {}, "relation": {}}
TOTALS = RowCounts(response=40, visual=64, relation=4, samples=5, micro_batches=3)


def test_shares_of_rows_samples_and_micro_batches() -> None:
    counts = [3, 0, 5]
    assert weigh_rows("rows", counts, total_rows=40, totals=TOTALS) == [WeightedRows(0, 8, 1 / 40)]
    assert weigh_rows("micro_batch", counts, total_rows=40, totals=TOTALS) == [WeightedRows(0, 8, 1 / 24)]
    assert weigh_rows("samples", counts, total_rows=40, totals=TOTALS) == [
        WeightedRows(0, 3, 1 / 15),
        WeightedRows(3, 8, 1 / 25),
    ]
    assert weigh_images("rows", [2, 0, 1], totals=TOTALS) == [1 / 4] * 3
    assert weigh_images("micro_batch", [2, 0, 1], totals=TOTALS) == [1 / 9] * 3
    assert weigh_images("samples", [2, 0, 1], totals=TOTALS) == [1 / 10, 1 / 10, 1 / 5]


@pytest.mark.parametrize("mean", ["rows", "samples", "micro_batch"])
def test_a_micro_batch_without_rows_has_one_empty_share(mean: Any) -> None:
    for counts in ([], [0, 0]):
        (share,) = weigh_rows(mean, counts, total_rows=0, totals=RowCounts(0, 0, 0))
        assert (share.start, share.stop) == (0, 0)
        assert np.isfinite(share.weight)
    assert weigh_images(mean, [0, 0], totals=TOTALS) == []


@pytest.fixture(scope="module")
def stage_data(checkpoint: Path, cache: Path) -> StageData:
    stage = StageSection(init=str(checkpoint), steps=1, losses=LossesSection.model_validate(LOSSES))
    return prepare_stage_data(stage, str(cache))


def published(run: Run, *, ranks: int, micro: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the loss from whole logits in float64: each micro-batch's means, averaged over micro-batches."""
    model, sequence_format = run.student.model.double(), run.stage_data.checkpoint.sequence_format
    pixels_of = open_images(run.stage_data.cache, None, run.stage_data.checkpoint.image_processor)
    model.zero_grad()
    plans = [plan for plan in run._plans(ranks, micro, 10) if plan.counted]
    sums: dict[str, float] = dict.fromkeys(("cross_entropy", "response", "visual", "relation"), 0.0)
    for plan in plans:
        rows: dict[str, list[Tensor]] = {"cross_entropy": [], "response": [], "visual": []}
        ours, theirs, num_response, num_visual = [], [], 0, 0
        for row in plan.rows:
            record = run.stage_data.cache.read(int(run.stage_data.table.indices[row]))
            batch = run.batch(int(run.stage_data.table.indices[row]))
            (image,) = record.tokens.images
            pixels = pixels_of.load_pixels(image, sample_id="")[None].double()
            logits = model(input_ids=batch.input_ids, pixel_values=pixels).logits[0, :, :300]
            is_image = batch.input_ids[0] == sequence_format.image_token_id
            mask = torch.from_numpy(record.tokens.response_mask)
            before = logits[len(is_image) - len(mask) :][:-1][mask[1:]] if not mask[0] else logits[:0]
            labels = torch.from_numpy(record.tokens.token_ids).long()[mask]
            assert record.response is not None
            zeros = np.zeros(64)
            rows["cross_entropy"].append(cross_entropy(before, labels, reduction="sum"))
            rows["response"].append(sparse_loss(record.response, zeros, before, LossSpec()))
            rows["visual"].append(sparse_loss(record.visual[image.key], zeros, logits[is_image], LossSpec()))
            num_response += len(labels)
            num_visual += int(is_image.sum())
            matrix = record.relation[image.key]
            ours.append(logits[is_image] @ logits[is_image].T)
            theirs.append(torch.from_numpy(matrix.values).double() * matrix.norm)
        cosine = cosine_similarity(torch.stack(ours).flatten(), torch.stack(theirs).flatten(), dim=0)
        parts = {
            "cross_entropy": torch.stack(rows["cross_entropy"]).sum() / num_response,
            "response": torch.stack(rows["response"]).sum() / num_response,
            "visual": torch.stack(rows["visual"]).sum() / num_visual,
            "relation": 1 - cosine,
        }
        (torch.stack(list(parts.values())).sum() / len(plans)).backward()
        for name, part in parts.items():
            sums[name] += part.item() / len(plans)
    gradients = {name: p.grad.float() for name, p in run.student.named_parameters() if p.grad is not None}
    return {"loss": sum(sums.values()), **sums}, gradients


@pytest.mark.parametrize(
    ("losses", "ranks", "micro", "oracle"),
    [
        ({"literal": True}, 1, 1, (1, 1)),  # the published scripts: one sample a micro-batch, accumulated
        ({"literal": True}, 2, 3, (2, 3)),
        ({"mean": "micro_batch"}, 1, 1, (1, 1)),
        ({"mean": "samples"}, 1, 10, (1, 1)),  # whatever the micro-batches
        ({"mean": "samples"}, 3, 2, (1, 1)),
    ],
)
def test_value_and_gradients_agree_with_the_published_objective(
    stage_data: StageData, losses: dict, ranks: int, micro: int, oracle: tuple[int, int]
) -> None:
    totals, gradients = Run(stage_data, {**LOSSES, **losses})(ranks=ranks, micro=micro)
    expected, other = published(Run(stage_data, {**LOSSES, **losses}), ranks=oracle[0], micro=oracle[1])
    assert totals == pytest.approx(expected, rel=2e-4)
    for name, gradient in gradients.items():
        largest = float(other[name].abs().max())
        torch.testing.assert_close(gradient, other[name], rtol=2e-3, atol=1e-4 * max(largest, 1e-6))


def test_a_mean_over_rows_is_another_objective(stage_data: StageData) -> None:
    rows, _ = Run(stage_data, LOSSES)(ranks=1, micro=1)
    samples, _ = Run(stage_data, {**LOSSES, "mean": "samples"})(ranks=1, micro=1)
    assert abs(rows["cross_entropy"] - samples["cross_entropy"]) > 1e-3
    assert rows["visual"] == pytest.approx(samples["visual"], rel=1e-5)  # as many rows in every sample


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"losses": {"mean": "micro_batch"}},
            "losses.mean: micro_batch averages over.*group_by_length",
        ),
        ({"losses": {"literal": True}}, "losses.literal averages over.*group_by_length"),
        ({"losses": {"literal": True, "mean": "rows"}, "group_by_length": False}, "mean is 'rows'"),
    ],
)
def test_invalid_means_are_refused_by_name(stage: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StageSection.model_validate({"init": "x", "steps": 1, **stage})
