from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from storage.reader import Cache
from student_train.batch import collate
from student_train.config import LossesSection, StageSection
from student_train.images import FeatureStore, VisionSource, open_images
from student_train.loader import plans
from student_train.losses import bucketed_forward_kl, cross_entropy, relation_loss
from student_train.material import Material, prepare
from student_train.models import freeze, load_student
from student_train.objective import Objective, part_names
from student_train.student import Student
from tests.student_train.caches import make_cache

ALL = {"cross_entropy": 0.7, "response": {"weight": 0.5}, "visual": {"weight": 0.3}, "relation": {"weight": 2.0}}
FAMILIES = ("response", "visual", "relation")


@pytest.fixture(scope="module")
def material(checkpoint: Path, cache: Path) -> Material:
    stage = StageSection(init=str(checkpoint), steps=1, losses=LossesSection.model_validate(ALL))
    return prepare(stage, str(cache))


class Run:
    """One student and what it computes on plans, ranks one after another in this process."""

    def __init__(self, material: Material, losses: dict, *, keep: bool = True, chunk_logits: int = 1 << 25) -> None:
        self.material = material
        model = load_student(material.checkpoint, precision="fp32", device=torch.device("cpu"))
        freeze(model, ("projector", "llm"))
        features = FeatureStore(1 << 20) if keep else None
        identity = material.cache.identity
        self.student = Student(
            model, vocab_size=identity.vocab_size, image_token_id=identity.image_token_id, features=features
        )
        folder = open_images(material.cache, None, material.checkpoint.image_processor)
        self.vision = VisionSource(folder, features=features, pixels=FeatureStore(0))
        section = LossesSection.model_validate(losses)
        self.objective = Objective(
            self.student, section, centered=False, relation_pool=material.relation_pool, chunk_logits=chunk_logits
        )
        self.families = tuple(name for name in part_names(section) if name != "cross_entropy")

    def __call__(self, *, ranks: int, micro: int, size: int = 10) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Loss parts summed over ranks and micro-batches, and the gradients that add up."""
        self.student.zero_grad()
        totals: dict[str, float] = {}
        for plan in self._plans(ranks, micro, size):
            records = [self.material.cache.read(int(self.material.table.indices[row])) for row in plan.rows]
            batch = collate(
                records, self.material.checkpoint.grid, self.vision.gather,
                families=self.families, counted=plan.counted,
            )  # fmt: skip
            parts = self.objective(batch, plan.totals, plan.largest)
            parts["loss"].backward()
            for name, value in parts.items():
                totals[name] = totals.get(name, 0) + value.item()
        named = self.student.named_parameters()
        return totals, {name: p.grad.clone() for name, p in named if p.grad is not None}

    def _plans(self, ranks: int, micro: int, size: int) -> Iterator:
        for rank in range(ranks):
            yield from plans(self.material.table, size, micro, steps=range(1), seed=4, rank=rank, num_ranks=ranks)


def test_loss_and_gradient_are_the_same_however_a_batch_is_split(material: Material) -> None:
    run = Run(material, ALL)
    expected, gradients = run(ranks=1, micro=10)
    assert set(expected) == {"loss", "cross_entropy", "response", "visual", "relation"}
    for ranks, micro in ((1, 3), (2, 5), (3, 2), (4, 1), (11, 4)):  # 11 ranks: one has no sample
        totals, others = run(ranks=ranks, micro=micro)
        for name, value in expected.items():
            assert totals[name] == pytest.approx(value, rel=1e-5, abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


def test_chunks_of_the_head_change_nothing(material: Material) -> None:
    expected, gradients = Run(material, ALL)(ranks=1, micro=10)
    totals, others = Run(material, ALL, keep=False, chunk_logits=300 * 7)(ranks=1, micro=10)
    for name, value in expected.items():
        assert totals[name] == pytest.approx(value, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


def test_parts_are_means_over_the_rows_of_the_global_batch(material: Material) -> None:
    """A slow reference: whole logits of one sample after another, rows found token by token."""
    run = Run(material, ALL)
    totals, _ = run(ranks=2, micro=2)
    model, grid, table = run.student.model, material.checkpoint.grid, material.table
    sums, rows = dict.fromkeys(("cross_entropy", "response", "visual", "relation"), 0.0), dict.fromkeys(ALL, 0)
    metric = model.lm_head.weight[:300].detach()
    metric = metric.T @ metric
    used = np.concatenate([plan.rows for plan in run._plans(1, 10, 10)])
    with torch.no_grad():
        for index in table.indices[used]:
            record = material.cache.read(int(index))
            batch = collate([record], grid, run.vision.gather, families=FAMILIES)
            pixels = open_images(material.cache, None, material.checkpoint.image_processor).pixels(
                record.tokens.images[0], sample_id=""
            )[None]
            states = model.model(input_ids=batch.input_ids, pixel_values=pixels).last_hidden_state[0]
            logits = model.lm_head(states)[:, :300]
            ids = batch.input_ids[0].tolist()
            first_visual = ids.index(grid.image_token_id)
            start = len(ids) - len(record.tokens.token_ids) + int(np.flatnonzero(record.tokens.response_mask)[0])
            count = record.tokens.num_response_tokens
            labels = torch.tensor(ids[start : start + count])
            before = logits[start - 1 : start + count - 1]
            visual = slice(first_visual, first_visual + 16)
            assert batch.response is not None
            assert batch.visual is not None
            assert batch.relation is not None
            sums["cross_entropy"] += cross_entropy(before, labels).item()
            sums["response"] += bucketed_forward_kl(before, batch.response).item()
            sums["visual"] += bucketed_forward_kl(logits[visual], batch.visual).item()
            sums["relation"] += relation_loss(states[visual][None], metric, batch.relation).item()
            for name, number in (("cross_entropy", count), ("response", count), ("visual", 16), ("relation", 1)):
                rows[name] += number
    for name, total in sums.items():
        assert totals[name] == pytest.approx(total / rows[name], rel=1e-4)
    weights = {"cross_entropy": 0.7, "response": 0.5, "visual": 0.3, "relation": 2.0}
    assert totals["loss"] == pytest.approx(sum(weights[name] * totals[name] for name in weights), rel=1e-5)


@pytest.mark.parametrize("losses", [{}, {"cross_entropy": 0, "visual": {}}, {"response": {}}, {"relation": {}}])
def test_only_the_losses_asked_for_are_computed(material: Material, losses: dict) -> None:
    totals, gradients = Run(material, losses)(ranks=1, micro=5)
    section = LossesSection.model_validate(losses)
    assert tuple(totals) == ("loss", *part_names(section))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_a_batch_without_images_reaches_every_trained_parameter(material: Material, tmp_path: Path) -> None:
    """Ranks reduce gradients of the same parameters, so none may be left out."""
    from dataclasses import replace

    run = Run(material, {"visual": {}, "relation": {}})
    record = material.cache.read(0)
    image_token = material.cache.identity.image_token_id
    keep = record.tokens.token_ids != image_token
    text = replace(
        record.tokens, token_ids=record.tokens.token_ids[keep],
        response_mask=record.tokens.response_mask[keep], images=(),
    )  # fmt: skip
    batch = collate([replace(record, tokens=text)], material.checkpoint.grid, run.vision.gather, families=FAMILIES)
    plan = next(iter(run._plans(1, 10, 10)))
    parts = run.objective(batch, plan.totals, plan.largest)
    parts["loss"].backward()
    assert parts["visual"].item() == 0
    assert parts["relation"].item() == 0
    missing = [name for name, p in run.student.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize(
    "relation",
    [{"encoding": "low_rank", "max_cosine_error": 1e-6}, {"encoding": "triangle_int8"}, {"encoding": "pooled"}],
)
def test_every_encoding_of_relation_matrices_trains(checkpoint: Path, tmp_path: Path, relation: dict) -> None:
    """The same matrices from a cache of plain triangles, pooled by hand where the encoding pools."""
    losses = {"cross_entropy": 0, "relation": {}}
    stage = StageSection(init=str(checkpoint), steps=1, losses=LossesSection.model_validate(losses))
    folders = {}
    for name, section in (("plain", {}), ("encoded", relation)):
        folders[name] = make_cache(
            tmp_path / name, checkpoint, num_samples=4, num_images=4, families=("relation",),
            selection={"relation": section},
        )  # fmt: skip
    plain, encoded = (prepare(stage, str(folder)) for folder in folders.values())
    run = Run(encoded, losses)
    totals, _ = run(ranks=1, micro=2, size=4)
    with torch.no_grad():
        expected = 0.0
        for index in plain.table.indices:
            batch = collate(
                [plain.cache.read(int(index))], plain.checkpoint.grid, run.vision.gather, families=run.families
            )
            states = run.student.hidden(batch.input_ids, batch.visual_positions, batch.vision)
            rows = states[batch.visual_positions.flatten()]
            assert batch.relation is not None
            teacher = batch.relation[0]
            if relation["encoding"] == "pooled":
                rows = rows.reshape(2, 2, 2, 2, -1).mean((1, 3)).flatten(0, 1)
                teacher = teacher.reshape(2, 2, 2, 2, 2, 2, 2, 2).mean((1, 3, 5, 7)).reshape(4, 4)
            gram = rows @ run.student.head_metric(rows) @ rows.T
            expected += float(1 - (gram * teacher).sum() / gram.norm() / teacher.norm())
    assert totals["relation"] == pytest.approx(expected / 4, rel=1e-3)


def test_no_loss_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no loss is left"):
        LossesSection(cross_entropy=0)


def test_material_reads_only_the_families_that_losses_need(checkpoint: Path, cache: Path) -> None:
    stage = StageSection(init=str(checkpoint), steps=1)
    record = prepare(stage, str(cache)).cache.read(0)
    assert record.response is None
    assert not record.visual
    assert Cache.open(cache).read(0).response is not None
