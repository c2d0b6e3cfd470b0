"""Short trainings of digits students in one process, and how near they come to the teacher.

The trainer's own parts (order of samples, collation, objective, schedule, AdamW, clipping) without DeepSpeed, logs and
checkpoints. Legend: r rows, v vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.online import OnlineObjective, teacher_head
from benchmarks.teacher_caches import Asked, TeacherStates
from storage.reader.cache import Cache
from student_train.data.batch_schedule import SampleTable, plan_micro_batches
from student_train.data.collate import Batch, GatherImages, collate
from student_train.data.mixture import CacheSource, Mixture
from student_train.losses.config import LossesSection
from student_train.models.loading import Checkpoint, freeze, load_student, read_checkpoint
from student_train.models.student import Student
from student_train.training.objective import Objective
from student_train.training.stage_data import StageData, list_loss_families, load_cached_teacher
from student_train.training.trainer import compute_learning_rate

NUM_BINS = 15  # of the calibration error; Guo et al., arXiv 1706.04599


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a student is trained; lr as in pipeline.yaml."""

    steps: int = 200
    batch: int = 32
    lr: float = 2e-3
    warmup_fraction: float = 0.03
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Found:
    """A trained student on held-out questions."""

    accuracy: float  # share of questions whose every answer token is the student's first choice: what it then says
    kl: float  # nats a response row, dense, from the teacher
    visual_kl: float  # nats a visual row
    calibration_error: float  # of the first choice at answer tokens, expected, over equal bins
    cross_entropy: float  # nats a token, of the right answers
    seconds: float  # of training


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out questions as batches, and the teacher's rows of them."""

    batches: list[Batch]
    response: list[Tensor]  # (r, v) logprobs of each batch
    visual: list[Tensor]

    @staticmethod
    def of(asked: Asked, states: TeacherStates) -> HeldOut:
        """The split `test`."""
        head, response, visual, batches, done = teacher_head(asked.teacher), [], [], [], 0
        for records, batch in asked.batches(asked.samples("test")):
            hidden = torch.cat(states.response[done : done + len(records)])
            images = [image.key for record in records for image in record.tokens.images]
            response.append(head.compute_logits(hidden, dtype=torch.float32).log_softmax(1))
            rows = torch.cat([states.visual[key] for key in images])
            visual.append(head.compute_logits(rows, dtype=torch.float32).log_softmax(1))
            batches.append(batch)
            done += len(records)
        return HeldOut(batches, response, visual)


def train_student(
    init: Path,
    asked: Asked,
    losses: LossesSection,
    cache: Cache | None,
    seed: int,
    schedule: Schedule,
    *,
    online: TeacherStates | None = None,
) -> tuple[Student, float]:
    """A student trained from `cache`, or (None) from labels or an `online` teacher alone; and the seconds it took.

    The order of samples and the student are those of the seed, whatever the losses.
    """
    started = time.perf_counter()
    checkpoint = read_checkpoint(init)
    model = load_student(checkpoint, precision="fp32", device=torch.device("cpu"))
    freeze(model, ("projector", "llm"))
    identity = asked.tokens.identity
    student = Student(
        model, vocab_size=identity.vocab_size, image_token_id=identity.image_token_id, features=asked.features
    )
    stage_data = make_stage_data(asked.tokens if cache is None else cache, checkpoint)
    if online is not None:
        objective, families = OnlineObjective(student, losses, online.of, teacher_head(asked.teacher)), ()
    else:
        teacher = load_cached_teacher(stage_data, losses)
        objective, families = Objective(student, losses, teacher, chunk_logits=1 << 27), list_loss_families(losses)
    fit(objective, stage_data, asked.vision.gather, families, seed=seed, schedule=schedule)
    return student, time.perf_counter() - started


def make_stage_data(cache: Cache, checkpoint: Checkpoint) -> StageData:
    """The split `train` of a cache, in the same order whatever else the cache holds."""
    indices = cache.splits.find_positions(["train"])
    rows, images, visual = (
        counts[indices].astype(np.int64)
        for counts in (cache.num_response_rows, cache.num_images, cache.num_visual_tokens)
    )
    return StageData(Mixture([CacheSource(cache, indices)]), SampleTable(indices, rows, images, visual), checkpoint)


def fit(
    objective: Objective,
    stage_data: StageData,
    gather: GatherImages,
    families: Sequence[str],
    *,
    seed: int,
    schedule: Schedule,
) -> None:
    """Train what of an objective trains, as a trainer's loop with one micro-batch a step."""
    parameters = [each for each in objective.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    table = stage_data.table
    steps = range(schedule.steps)
    for plan in plan_micro_batches(table, schedule.batch, schedule.batch, steps=steps, seed=seed, rank=0, num_ranks=1):
        epoch = plan.step * schedule.batch // len(table)
        samples = stage_data.mixture.read_many(table.indices[plan.rows], draw_set=epoch)
        batch = collate(samples, stage_data.checkpoint.sequence_format, gather, families=families)
        objective(batch, plan.totals, plan.largest)["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, schedule.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = compute_learning_rate(
                plan.step, num_steps=schedule.steps, peak=schedule.lr, warmup_fraction=schedule.warmup_fraction
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.inference_mode()
def judge(student: Student, held_out: HeldOut, seconds: float) -> Found:
    """How a student does on held-out questions."""
    student.eval()
    num_right, num_questions, sums, rows, visual_rows = 0, 0, torch.zeros(3, dtype=torch.float64), 0, 0
    confidences, hits = [], []
    for batch, response, visual in zip(held_out.batches, held_out.response, held_out.visual, strict=True):
        hidden = student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
        log_q = student.compute_logits(hidden.index_select(0, batch.response_positions)).log_softmax(1)
        log_q_visual = student.compute_logits(hidden.index_select(0, batch.visual_positions.flatten())).log_softmax(1)
        confidence, choice = log_q.exp().max(1)
        hit = choice == batch.labels
        num_right += sum(bool(each.all()) for each in hit.split(batch.response_counts.tolist()))
        num_questions += len(batch.response_counts)
        sums += torch.stack([
            _kl_sum(response, log_q), _kl_sum(visual, log_q_visual),
            -log_q.gather(1, batch.labels[:, None]).double().sum(),
        ])  # fmt: skip
        rows, visual_rows = rows + len(response), visual_rows + len(visual)
        confidences.append(confidence)
        hits.append(hit)
    return Found(
        accuracy=num_right / num_questions,
        kl=float(sums[0]) / rows,
        visual_kl=float(sums[1]) / visual_rows,
        calibration_error=calibration_error(torch.cat(confidences), torch.cat(hits)),
        cross_entropy=float(sums[2]) / rows,
        seconds=seconds,
    )


def calibration_error(confidence: Tensor, hit: Tensor) -> float:
    """Mean distance between confidence and accuracy over bins of equal width, weighted by how many fall in each."""
    bins = (confidence * NUM_BINS).long().clamp_max(NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS, dtype=torch.float64).index_add_(0, bins, confidence.double() - hit.double())
    return float(gaps.abs().sum()) / len(confidence)


def _kl_sum(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).double().sum()
