from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from storage.config import SelectionSection
from storage.reader.cache import Cache
from student_train.config import StageSection
from student_train.data.batch_schedule import plan_micro_batches
from student_train.data.collate import Batch, collate
from student_train.data.sample_images import TensorStore, VisionGatherer, open_images
from student_train.losses.config import LossesSection
from student_train.losses.relation import compute_head_gram, relation_loss
from student_train.losses.sparse_divergence import LossSpec
from student_train.models.loading import freeze, load_student
from student_train.models.student import Student
from student_train.training.objective import Objective, list_part_names
from student_train.training.stage_data import StageData, list_loss_families, load_cached_teacher, prepare_stage_data
from tests.student_train.caches import join_records, make_cache
from tests.student_train.references import dense_loss, sparse_loss

ALL = {"cross_entropy": 0.7, "response": {"weight": 0.5}, "visual": {"weight": 0.3}, "relation": {"weight": 2.0}}
FAMILIES = ("response", "visual", "relation")


@pytest.fixture(scope="module")
def stage_data(checkpoint: Path, cache: Path) -> StageData:
    stage = StageSection(init=str(checkpoint), steps=1, losses=LossesSection.model_validate(ALL))
    return prepare_stage_data(stage, str(cache))


class Run:
    """Runs an objective on all plans of a global batch, ranks one after another in this process."""

    def __init__(self, stage_data: StageData, losses: dict, *, keep: bool = True, chunk_logits: int = 1 << 25) -> None:
        self.stage_data = stage_data
        model = load_student(stage_data.checkpoint, precision="fp32", device=torch.device("cpu"))
        freeze(model, ("projector", "llm"))
        features = TensorStore(1 << 20) if keep else None
        identity = stage_data.cache.identity
        self.student = Student(
            model, vocab_size=identity.vocab_size, image_token_id=identity.image_token_id, features=features
        )
        folder = open_images(stage_data.cache, None, stage_data.checkpoint.image_processor)
        self.vision = VisionGatherer(folder, features=features, pixels=TensorStore(0))
        section = LossesSection.model_validate(losses)
        teacher = load_cached_teacher(stage_data, section)
        self.objective = Objective(self.student, section, teacher, chunk_logits=chunk_logits)
        self.families = list_loss_families(section)

    def batch(self, index: int) -> Batch:
        """Collate a batch of one sample of the cache."""
        samples = self.stage_data.cache.read_many([index])
        return collate(samples, self.stage_data.checkpoint.sequence_format, self.vision.gather, families=self.families)

    def __call__(self, *, ranks: int, micro: int, size: int = 10) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return the loss parts and the gradients, both summed over ranks and micro-batches."""
        self.student.zero_grad()
        totals: dict[str, float] = {}
        for plan in self._plans(ranks, micro, size):
            samples = self.stage_data.cache.read_many(self.stage_data.table.indices[plan.rows])
            batch = collate(
                samples, self.stage_data.checkpoint.sequence_format, self.vision.gather,
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
            yield from plan_micro_batches(
                self.stage_data.table, size, micro, steps=range(1), seed=4, rank=rank, num_ranks=ranks
            )


def test_loss_and_gradient_are_the_same_however_a_batch_is_split(stage_data: StageData) -> None:
    run = Run(stage_data, ALL)
    expected, gradients = run(ranks=1, micro=10)
    assert set(expected) == {"loss", "cross_entropy", "response", "visual", "relation"}
    for ranks, micro in ((1, 3), (2, 5), (3, 2), (4, 1), (11, 4)):  # 11 ranks: one has no sample
        totals, others = run(ranks=ranks, micro=micro)
        for name, value in expected.items():
            assert totals[name] == pytest.approx(value, rel=1e-5, abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


def test_chunk_size_of_the_head_does_not_change_the_loss(stage_data: StageData) -> None:
    expected, gradients = Run(stage_data, ALL)(ranks=1, micro=10)
    totals, others = Run(stage_data, ALL, keep=False, chunk_logits=300 * 7)(ranks=1, micro=10)
    for name, value in expected.items():
        assert totals[name] == pytest.approx(value, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


def test_parts_are_means_over_the_rows_of_the_global_batch(stage_data: StageData) -> None:
    """A slow reference: whole logits of one sample after another, rows found token by token."""
    run = Run(stage_data, ALL)
    totals, _ = run(ranks=2, micro=2)
    model, sequence_format, table = run.student.model, stage_data.checkpoint.sequence_format, stage_data.table
    sums, rows = dict.fromkeys(("cross_entropy", "response", "visual", "relation"), 0.0), dict.fromkeys(ALL, 0)
    metric = model.lm_head.weight[:300].detach()
    metric = metric.T @ metric
    used = np.concatenate([plan.rows for plan in run._plans(1, 10, 10)])
    with torch.no_grad():
        for index in table.indices[used]:
            record = stage_data.cache.read(int(index))
            batch = collate(join_records([record]), sequence_format, run.vision.gather, families=FAMILIES)
            pixels = open_images(stage_data.cache, None, stage_data.checkpoint.image_processor).load_pixels(
                record.tokens.images[0], sample_id=""
            )[None]
            states = model.model(input_ids=batch.input_ids, pixel_values=pixels).last_hidden_state[0]
            logits = model.lm_head(states)[:, :300]
            ids = batch.input_ids[0].tolist()
            first_visual = ids.index(sequence_format.image_token_id)
            start = len(ids) - len(record.tokens.token_ids) + int(np.flatnonzero(record.tokens.response_mask)[0])
            count = record.tokens.num_response_tokens
            labels = torch.tensor(ids[start : start + count])
            before = logits[start - 1 : start + count - 1]
            visual = slice(first_visual, first_visual + 16)
            sums["cross_entropy"] += cross_entropy(before, labels, reduction="sum").item()
            zeros = np.zeros(64)
            (image,) = record.tokens.images
            assert record.response is not None
            sums["response"] += sparse_loss(record.response, zeros, before, LossSpec()).item()
            sums["visual"] += sparse_loss(record.visual[image.key], zeros, logits[visual], LossSpec()).item()
            gram = states[visual] @ metric @ states[visual].T
            teacher = torch.from_numpy(record.relation[image.key].values)
            sums["relation"] += float(1 - (gram * teacher).sum() / gram.norm() / teacher.norm())
            for name, number in (("cross_entropy", count), ("response", count), ("visual", 16), ("relation", 1)):
                rows[name] += number
    for name, total in sums.items():
        assert totals[name] == pytest.approx(total / rows[name], rel=1e-4)
    weights = {"cross_entropy": 0.7, "response": 0.5, "visual": 0.3, "relation": 2.0}
    assert totals["loss"] == pytest.approx(sum(weights[name] * totals[name] for name in weights), rel=1e-5)


@pytest.mark.parametrize("losses", [{}, {"cross_entropy": 0, "visual": {}}, {"response": {}}, {"relation": {}}])
def test_only_the_losses_asked_for_are_computed(stage_data: StageData, losses: dict) -> None:
    totals, gradients = Run(stage_data, losses)(ranks=1, micro=5)
    section = LossesSection.model_validate(losses)
    assert tuple(totals) == ("loss", *list_part_names(section))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_a_batch_without_images_reaches_every_trained_parameter(stage_data: StageData, tmp_path: Path) -> None:
    """Ranks reduce the gradients of the same parameters, so none may be missing."""
    from dataclasses import replace

    run = Run(stage_data, {"visual": {}, "relation": {}})
    record = stage_data.cache.read(0)
    image_token = stage_data.cache.identity.image_token_id
    keep = record.tokens.token_ids != image_token
    text = replace(
        record.tokens, token_ids=record.tokens.token_ids[keep],
        response_mask=record.tokens.response_mask[keep], images=(),
    )  # fmt: skip
    batch = collate(
        join_records([replace(record, tokens=text)]),
        stage_data.checkpoint.sequence_format,
        run.vision.gather,
        families=FAMILIES,
    )
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
    """Compared with the matrices of a cache of plain triangles, pooled by hand if the encoding pools."""
    losses = {"cross_entropy": 0, "relation": {}}
    stage = StageSection(init=str(checkpoint), steps=1, losses=LossesSection.model_validate(losses))
    folders = {}
    for name, section in (("plain", {}), ("encoded", relation)):
        folders[name] = make_cache(
            tmp_path / name, checkpoint, num_samples=4, num_images=4, families=("relation",),
            selection={"relation": section},
        )  # fmt: skip
    plain, encoded = (prepare_stage_data(stage, str(folder)) for folder in folders.values())
    run = Run(encoded, losses)
    totals, _ = run(ranks=1, micro=2, size=4)
    with torch.no_grad():
        expected = 0.0
        for index in plain.table.indices:
            batch = collate(
                plain.cache.read_many([index]),
                plain.checkpoint.sequence_format,
                run.vision.gather,
                families=run.families,
            )
            states = run.student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
            rows = states[batch.visual_positions.flatten()]
            assert batch.relation is not None
            teacher = batch.relation[0].values[0]
            if relation["encoding"] == "pooled":
                rows = rows.reshape(2, 2, 2, 2, -1).mean((1, 3)).flatten(0, 1)
                teacher = teacher.reshape(2, 2, 2, 2, 2, 2, 2, 2).mean((1, 3, 5, 7)).reshape(4, 4)
            gram = rows @ compute_head_gram(run.student.model.lm_head.weight, vocab_size=300) @ rows.T
            expected += float(1 - (gram * teacher).sum() / gram.norm() / teacher.norm())
    assert totals["relation"] == pytest.approx(expected / 4, rel=1e-3)


def test_losses_that_are_all_off_are_refused() -> None:
    with pytest.raises(ValueError, match="all losses are off"):
        LossesSection(cross_entropy=0)


def test_stage_data_reads_only_the_families_that_losses_need(checkpoint: Path, cache: Path) -> None:
    stage = StageSection(init=str(checkpoint), steps=1)
    record = prepare_stage_data(stage, str(cache)).cache.read(0)
    assert record.response is None
    assert not record.visual
    assert Cache.open(cache).read(0).response is not None


def visual_rows(run: Run, batch: Batch) -> Tensor:
    """Return the student's hidden states (n, d) of an image's visual tokens."""
    with torch.no_grad():
        states = run.student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
    return states[batch.visual_positions.flatten()]


@pytest.mark.parametrize("tokens", [4, 9, 64])
def test_visual_rows_are_resampled_to_the_teacher_s_grid(checkpoint: Path, tmp_path: Path, tokens: int) -> None:
    """The student has 4 x 4 visual tokens; the reference averages its logits over the areas of the teacher's cells."""
    losses = {"cross_entropy": 0, "visual": {}, "relation": {}}
    folder = make_cache(tmp_path, checkpoint, num_samples=4, num_images=4, tokens_per_image=tokens)
    stage = StageSection(init=str(checkpoint), steps=1, losses=LossesSection.model_validate(losses))
    stage_data = prepare_stage_data(stage, str(folder))
    run = Run(stage_data, losses)
    totals, gradients = run(ranks=2, micro=1, size=4)
    fine = 12 if tokens != 64 else 8  # a grid that both divide
    visual = relation = 0.0
    for index in stage_data.table.indices:
        batch, record = run.batch(int(index)), stage_data.cache.read(int(index))
        (image,) = record.tokens.images
        logits = (visual_rows(run, batch) @ run.student.model.lm_head.weight[:300].T).detach().double()
        side = int(tokens**0.5)
        spread = logits.view(4, 4, 300).repeat_interleave(fine // 4, 0).repeat_interleave(fine // 4, 1)
        cells = spread.view(side, fine // side, side, fine // side, 300).mean((1, 3)).flatten(0, 1)
        visual += sparse_loss(record.visual[image.key], np.zeros(tokens), cells, LossSpec()).item()
        gram, teacher = cells @ cells.T, torch.from_numpy(record.relation[image.key].values)
        relation += float(1 - (gram * teacher).sum() / gram.norm() / teacher.norm())
    assert totals["visual"] == pytest.approx(visual / (4 * tokens), rel=1e-4)
    assert totals["relation"] == pytest.approx(relation / 4, rel=1e-4)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_every_divergence_and_treatment_trains(checkpoint: Path, tmp_path: Path) -> None:
    """On rows with a stored temperature, through the config: the value agrees with the reference for any chunk size."""
    folder = make_cache(
        tmp_path, checkpoint, num_samples=4, num_images=4, families=("response",), temperatures=(2.0,), tau=0.02,
    )  # fmt: skip
    for response in (
        {"treatment": "unbiased"}, {"treatment": "truncate"}, {"treatment": "renormalise", "temperature": 3.0},
        {"divergence": "jsd", "beta": 0.3}, {"divergence": "reverse_kl", "temperature": 2.0},
        {"divergence": "skewed_kl", "temperature": 2.0}, {"divergence": "total_variation", "weight": 0.5},
        {"divergence": "cross_entropy"},
    ):  # fmt: skip
        losses = {"cross_entropy": 0, "response": response}
        section = LossesSection.model_validate(losses)
        stage_data = prepare_stage_data(StageSection(init=str(checkpoint), steps=1, losses=section), str(folder))
        run = Run(stage_data, losses, chunk_logits=300 * 3)
        totals, _ = run(ranks=1, micro=2, size=4)
        assert section.response is not None
        treatment = section.response.resolve_treatment(SelectionSection().selection)
        spec = LossSpec(section.response.divergence, treatment, section.response.temperature, section.response.beta)
        expected, count = 0.0, 0
        for index in stage_data.table.indices:
            batch, record = run.batch(int(index)), stage_data.cache.read(int(index))
            with torch.no_grad():
                states = run.student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
                logits = run.student.compute_logits(states[batch.response_positions])
            assert record.response is not None
            column = record.response.log_sum_exp[:, 0] * (spec.temperature == 2)
            expected += sparse_loss(record.response, column, logits, spec).item()
            count += len(logits)
        assert totals["response"] == pytest.approx(expected / count, rel=1e-3), response
        assert totals["loss"] == pytest.approx(totals["response"] * section.response.weight, rel=1e-6)


def test_exact_rows_come_from_hidden_states_and_the_teacher_s_head(checkpoint: Path, tmp_path: Path) -> None:
    folder = make_cache(tmp_path, checkpoint, num_samples=4, num_images=4, families=("hidden",))
    losses = {"response": {"treatment": "exact", "divergence": "reverse_kl", "temperature": 1.5}}
    section = LossesSection.model_validate(losses)
    stage_data = prepare_stage_data(StageSection(init=str(checkpoint), steps=1, losses=section), str(folder))
    assert "response" not in stage_data.cache.families
    run = Run(stage_data, losses)
    totals, _ = run(ranks=1, micro=2, size=4)
    head, expected, count = stage_data.cache.head(), 0.0, 0
    for index in stage_data.table.indices:
        batch, record = run.batch(int(index)), stage_data.cache.read(int(index))
        with torch.no_grad():
            states = run.student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
            logits = run.student.compute_logits(states[batch.response_positions])
        assert record.hidden is not None
        expected += dense_loss(head.logits(record.hidden), logits, LossSpec("reverse_kl", "exact", 1.5)).item()
        count += len(logits)
    assert totals["response"] == pytest.approx(expected / count, rel=1e-4)


def test_literal_takes_one_cosine_over_a_micro_batch(stage_data: StageData) -> None:
    losses = {"cross_entropy": 0, "relation": {}, "literal": True}
    run = Run(stage_data, losses)
    totals, _ = run(ranks=1, micro=5, size=10)
    expected = 0.0
    for plan in run._plans(1, 5, 10):
        ours, theirs = [], []
        for row in plan.rows:
            index = int(stage_data.table.indices[row])
            logits = visual_rows(run, run.batch(index)).double() @ run.student.model.lm_head.weight[:300].double().T
            (matrix,) = stage_data.cache.read(index).relation.values()
            ours.append((logits @ logits.T).detach())
            theirs.append(torch.from_numpy(matrix.values).double() * matrix.norm)
        flat, other = torch.stack(ours).flatten(), torch.stack(theirs).flatten()
        expected += float(1 - torch.nn.functional.cosine_similarity(flat, other, dim=0)) / 2
    assert totals["relation"] == pytest.approx(expected, rel=1e-4)
    assert tuple(totals) == ("loss", "relation")
    plain, _ = Run(stage_data, {"cross_entropy": 0, "relation": {}})(ranks=1, micro=5, size=10)
    assert plain["relation"] != pytest.approx(totals["relation"], rel=1e-4)
    single, _ = Run(stage_data, losses)(ranks=1, micro=1, size=10)  # the published code's batch of 1
    assert single["relation"] == pytest.approx(plain["relation"], rel=1e-4)


def test_samples_without_and_with_several_images_weigh_by_image(checkpoint: Path, tmp_path: Path) -> None:
    """With two images a sample each image counts once, in one micro-batch or in several."""
    folder = make_cache(tmp_path, checkpoint, num_samples=4, num_images=4, images_per_sample=2)
    losses = {"visual": {}, "relation": {}}
    stage = StageSection(init=str(checkpoint), steps=1, losses=LossesSection.model_validate(losses))
    run = Run(prepare_stage_data(stage, str(folder)), losses)
    together, one = run(ranks=1, micro=4, size=4)[0], run(ranks=2, micro=1, size=4)[0]
    for name, value in together.items():
        assert one[name] == pytest.approx(value, rel=1e-5)
    expected = 0.0
    for index in run.stage_data.table.indices:
        batch = run.batch(int(index))
        assert batch.relation is not None
        metric = compute_head_gram(run.student.model.lm_head.weight.detach(), vocab_size=300)
        expected += relation_loss(visual_rows(run, batch).view(2, 16, -1), metric, batch.relation[0]).item()
    assert together["relation"] == pytest.approx(expected / 8, rel=1e-4)
