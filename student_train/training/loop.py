"""The training loop of a stage: prefetches, steps, logs, keeps checkpoints, stops if the loss diverges."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from storage.processes.stop_signals import HeldSignals
from storage.reader.prefetch import prefetch
from storage.records.sample_batch import SampleBatch
from student_train.config import StageSection
from student_train.data.batch_schedule import MicroBatchPlan, Prefetcher, plan_micro_batches
from student_train.data.collate import Batch, collate
from student_train.data.sample_images import VisionGatherer
from student_train.training.checkpoint_rotation import BestCheckpoint, CheckpointRotation
from student_train.training.deepspeed_engine import Engine, Process, StepUpdate, measure_peak_memory
from student_train.training.journal import Journal
from student_train.training.loss_spikes import WINDOW, DivergedError, LossSpikeDetector, shorten_ids
from student_train.training.objective import list_part_names
from student_train.training.resume import Progress, StageState, StageStopped
from student_train.training.stage_data import StageData, list_loss_families


@dataclass(frozen=True, eq=False)
class BatchFeed:
    """Yields batches of samples with their images."""

    stage_data: StageData
    vision: VisionGatherer

    def read_batches(
        self, stage: StageSection, process: Process, *, size: int, steps: range, seed: int
    ) -> Prefetcher[tuple[MicroBatchPlan, Batch]]:
        """Prefetch this rank's forward passes for steps of `size` samples."""
        table = self.stage_data.table
        micro_plans = plan_micro_batches(
            table, size, stage.micro_batch, steps=steps, seed=seed, rank=process.rank, num_ranks=process.num_ranks
        )
        families, sequence_format = list_loss_families(stage.losses), self.stage_data.checkpoint.sequence_format

        def read(plan: MicroBatchPlan) -> tuple[MicroBatchPlan, SampleBatch]:
            epoch = plan.step * size // len(table)
            return plan, self.stage_data.mixture.read_many(table.indices[plan.rows].ravel(), draw_set=epoch)

        return Prefetcher(
            (plan, collate(samples, sequence_format, self.vision.gather, families=families, counted=plan.counted))
            for plan, samples in prefetch(read, micro_plans)
        )


@dataclass(frozen=True, eq=False)
class StageSetup:
    """Everything that the loop of a stage needs."""

    stage: StageSection  # resolved
    name: str
    num_steps: int
    learning_rate: Callable[[int], float]  # of a step counted from 0
    engine: Engine
    training: BatchFeed
    held_out: BatchFeed | None
    checkpoints: CheckpointRotation
    state: StageState


@dataclass(frozen=True)
class StageOutcome:
    """The outcome of a finished stage."""

    resumed_at: int  # steps that an earlier run had done
    losses: Mapping[str, float]  # loss and its parts at the last step
    best: BestCheckpoint | None


@dataclass(frozen=True, eq=False)
class StepResult:
    """One rank's outcome of one optimizer step."""

    parts: Mapping[str, float]  # this rank's share of the loss and its parts
    micro_batches: list[dict[str, Any]]  # sample ids and share of each part
    num_tokens: int
    num_positions: int  # with padding
    update: StepUpdate


def run_steps(setup: StageSetup, stop: HeldSignals) -> StageOutcome:
    """Run the remaining steps of a stage. A collective.

    Errors: StageStopped, after the state is saved, if any rank received SIGTERM or SIGINT before the last step;
    DivergedError.
    """
    stage, engine, average = setup.stage, setup.engine, setup.checkpoints.average
    progress = setup.state.resume(engine, average)
    num_done, last = progress.step, setup.num_steps
    setup.checkpoints.delete_stale(num_done)
    detector, best, criterion = LossSpikeDetector(stage.explosion_factor), None, _get_best_criterion(stage)
    if progress.notes:
        detector.load_state_dict(progress.notes["watch"])
        if progress.notes["best"] and progress.notes["judge"] == criterion:  # else another criterion chose it
            best = BestCheckpoint(**progress.notes["best"])
    final: Mapping[str, float] = {}
    journal = Journal(stage, setup.name, num_steps=last, resumed_at=num_done, process=engine.process)
    reader = setup.training.read_batches(
        stage, engine.process, size=stage.global_batch, steps=range(num_done, last), seed=stage.seed
    )
    with journal, reader:
        items = iter(reader)
        for step in range(num_done + 1, last + 1):
            torch.manual_seed(compute_dropout_seed(stage.seed, step, engine.process.rank))
            lr = setup.learning_rate(step - 1)
            result = run_optimizer_step(engine, items, lr, step)
            if average is not None:
                average.update(step)
            sums = engine.sum_over_ranks(
                {
                    **{part: result.parts[part] for part in ("loss", *list_part_names(stage.losses))},
                    "tokens": result.num_tokens, "positions": result.num_positions, "stop": float(stop.event.is_set()),
                }
            )  # fmt: skip
            tokens, positions, stop_requested = (sums.pop(name) for name in ("tokens", "positions", "stop"))
            journal.count_step(tokens, positions, sums)
            _refuse_explosion(sums["loss"], detector, result, step)
            detector.add(sums["loss"])
            held_out: dict[str, float] = {}
            keeps = stage.checkpoints is not None and (step % stage.checkpoints.every == 0 or step == last)
            if keeps and setup.held_out is not None:
                held_out = compute_held_out_losses(setup, setup.held_out)
            if (step - 1) % stage.log_every == 0 or step == last or held_out:
                memory = engine.max_over_ranks({"bytes": measure_peak_memory(engine.process.device)})
                final = sums
                journal.write(step, sums, held_out, lr=lr, update=result.update, memory_bytes=int(memory["bytes"]))
            if keeps:
                best = setup.checkpoints.keep(step, held_out, best, last=step == last)
            if step < last and (stop_requested or (stage.save_every is not None and step % stage.save_every == 0)):
                notes = {"watch": detector.state_dict(), "best": asdict(best) if best else None, "judge": criterion}
                setup.state.save(engine, Progress(step, notes), average=average, keep=stage.keep_states)
            if step < last and stop_requested:
                raise StageStopped(
                    stop.number or signal.SIGTERM,  # of another rank
                    f"stage {setup.name} was asked to stop after step {step} of {last}; its state is saved, "
                    "and the same command resumes it",
                )
    return StageOutcome(num_done, final, best)


def _get_best_criterion(stage: StageSection) -> dict[str, Any] | None:
    """Return the settings that decide which checkpoint is best; a resumed run may have others."""
    section = stage.checkpoints
    return None if section is None else section.model_dump(mode="json", include={"splits", "samples", "metric"})


def compute_dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed (below 2^64) of torch's generator in a step; different for each step and rank."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def compute_held_out_losses(setup: StageSetup, feed: BatchFeed) -> dict[str, float]:
    """Compute the loss and its parts on held-out samples, the same ones each time. A collective."""
    stage, engine, average = setup.stage, setup.engine, setup.checkpoints.average
    assert stage.checkpoints is not None
    size = min(stage.checkpoints.samples, len(feed.stage_data.table))
    totals = dict.fromkeys(("loss", *list_part_names(stage.losses)), 0.0)
    with (
        feed.read_batches(stage, engine.process, size=size, steps=range(1), seed=0) as reader,
        engine.evaluating(),
        contextlib.nullcontext() if average is None else average.swapped_in(),
    ):
        for plan, batch in reader:
            output = engine.forward(batch.to(engine.process.device), plan.totals, plan.largest)
            for name in totals:
                totals[name] += float(output[name])
    return engine.sum_over_ranks(totals)


def run_optimizer_step(
    engine: Engine, items: Iterator[tuple[MicroBatchPlan, Batch]], lr: float, step: int
) -> StepResult:
    """Run one rank's forward and backward passes of a step, and update the weights. `step`: counted from 1.

    DivergedError: a loss or the gradient is not finite.
    """
    outputs: list[Mapping[str, torch.Tensor]] = []
    sample_ids: list[tuple[str, ...]] = []
    num_tokens = num_positions = 0
    update = None
    while update is None:
        plan, batch = next(items)
        output = engine.forward(batch.to(engine.process.device), plan.totals, plan.largest)
        engine.backward(output["loss"])
        outputs.append({name: value.detach().float() for name, value in output.items()})
        sample_ids.append(batch.sample_ids)
        num_tokens += int(batch.lengths.sum()) * plan.counted
        num_positions += batch.input_ids.numel()
        if plan.micro == plan.num_micro - 1:
            _refuse_non_finite(outputs, sample_ids, step)
        update = engine.step(lr)
    parts = [{name: float(value) for name, value in each.items()} for each in outputs]
    done = StepResult(
        parts={name: math.fsum(each[name] for each in parts) for name in parts[0]},
        micro_batches=[{"sample_ids": ids, "parts": each} for ids, each in zip(sample_ids, parts, strict=True)],
        num_tokens=num_tokens,
        num_positions=num_positions,
        update=update,
    )
    if update.applied and not math.isfinite(update.grad_norm):
        raise DivergedError(
            f"step {step}: the gradient is not finite, but the loss is, in a batch with {_shorten_sample_ids(done)}; "
            "lower stages.NAME.lr, or inspect these samples",
            batch={"step": step, "grad_norm": str(update.grad_norm), "micro_batches": done.micro_batches},
            everywhere=True,
        )
    return done


def _refuse_non_finite(outputs: list[Mapping[str, torch.Tensor]], sample_ids: list[tuple[str, ...]], step: int) -> None:
    for parts, ids in zip(outputs, sample_ids, strict=True):
        broken = {name: str(float(value)) for name, value in parts.items() if not torch.isfinite(value)}
        if broken:
            raise DivergedError(
                f"step {step}: {', '.join(f'{name} is {value}' for name, value in broken.items())} on the samples "
                f"{shorten_ids(ids)}; lower stages.NAME.lr, or inspect these samples",
                batch={"step": step, "not_finite": broken, "micro_batches": [{"sample_ids": ids}]},
                everywhere=False,
            )


def _refuse_explosion(loss: float, detector: LossSpikeDetector, done: StepResult, step: int) -> None:
    limit = detector.compute_limit()
    if limit is not None and loss > limit:
        raise DivergedError(
            f"step {step}: the loss is {loss:.4g}, which is above {limit:.4g} (stages.NAME.explosion_factor times "
            f"the median of the last {WINDOW} steps) and above all earlier losses, in a batch with "
            f"{_shorten_sample_ids(done)}; lower stages.NAME.lr, inspect the samples, or raise explosion_factor",
            batch={"step": step, "loss": loss, "limit": limit, "micro_batches": done.micro_batches},
            everywhere=True,
        )


def _shorten_sample_ids(done: StepResult) -> str:
    return shorten_ids([each for micro in done.micro_batches for each in micro["sample_ids"]])
