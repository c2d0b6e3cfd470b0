"""The steps of a stage: reads ahead, steps, logs, keeps checkpoints, stops at a loss that diverges."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from storage.processes.stop_signals import HeldSignals
from storage.reader.prefetch import prefetch_batches
from student_train.config import StageSection
from student_train.data.batch_schedule import MicroPlan, ReadAhead, plans
from student_train.data.collate import Batch, collate
from student_train.data.sample_images import VisionSource
from student_train.training.checkpoint_rotation import Best, KeptCheckpoints
from student_train.training.deepspeed_engine import Engine, Process, Update, peak_memory_bytes
from student_train.training.journal import Journal
from student_train.training.loss_spikes import WINDOW, DivergedError, LossWatch, shortened
from student_train.training.objective import part_names
from student_train.training.resume import Progress, StageState, StageStopped
from student_train.training.stage_data import Material, loss_families


@dataclass(frozen=True, eq=False)
class Feed:
    """Samples and the images that belong to them."""

    material: Material
    vision: VisionSource

    def batches(
        self, stage: StageSection, process: Process, *, size: int, steps: range, seed: int
    ) -> ReadAhead[tuple[MicroPlan, Batch]]:
        """This rank's forward passes of some steps of `size` samples, read ahead."""
        table = self.material.table
        micro_plans = plans(
            table, size, stage.micro_batch, steps=steps, seed=seed, rank=process.rank, num_ranks=process.num_ranks
        )
        families, grid = loss_families(stage.losses), self.material.checkpoint.grid
        micro_plans, ahead, epochs = itertools.tee(micro_plans, 3)
        samples = prefetch_batches(
            self.material.data,
            (table.indices[plan.rows].ravel() for plan in ahead),
            draw_sets=(plan.step * size // len(table) for plan in epochs),
        )
        return ReadAhead(
            (plan, collate(records, grid, self.vision.gather, families=families, counted=plan.counted))
            for plan, records in zip(micro_plans, samples, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Setup:
    """What a stage runs with."""

    stage: StageSection  # resolved
    name: str
    num_steps: int
    learning_rate: Callable[[int], float]  # of a step counted from 0
    engine: Engine
    training: Feed
    held_out: Feed | None
    checkpoints: KeptCheckpoints
    state: StageState


@dataclass(frozen=True)
class Finished:
    """How a stage ended."""

    resumed_at: int  # steps
    losses: Mapping[str, float]  # parts of the last step
    best: Best | None


@dataclass(frozen=True, eq=False)
class Step:
    """What one rank did in one optimizer step."""

    parts: Mapping[str, float]  # this rank's share of the loss and its parts
    micro_batches: list[dict[str, Any]]  # of each its sample ids and its share of each part
    num_tokens: int
    num_positions: int  # with padding
    update: Update


def run_steps(setup: Setup, stop: HeldSignals) -> Finished:
    """The steps that are not done. A collective.

    Errors: StageStopped when SIGTERM or SIGINT has come to any rank before the last step, and all is saved;
    DivergedError.
    """
    stage, engine, average = setup.stage, setup.engine, setup.checkpoints.average
    progress = setup.state.resume(engine, average)
    done, last = progress.step, setup.num_steps
    setup.checkpoints.begin(done)
    watch, best, judge = LossWatch(stage.explosion_factor), None, _judge(stage)
    if progress.notes:
        watch.restore(progress.notes["watch"])
        if progress.notes["best"] and progress.notes["judge"] == judge:  # else it is best of something else
            best = Best(**progress.notes["best"])
    final: Mapping[str, float] = {}
    journal = Journal(stage, setup.name, num_steps=last, resumed_at=done, process=engine.process)
    reader = setup.training.batches(
        stage, engine.process, size=stage.global_batch, steps=range(done, last), seed=stage.seed
    )
    with journal, reader:
        items = iter(reader)
        for step in range(done + 1, last + 1):
            torch.manual_seed(dropout_seed(stage.seed, step, engine.process.rank))
            lr = setup.learning_rate(step - 1)
            mine = optimizer_step(engine, items, lr, step)
            if average is not None:
                average.update(step)
            sums = engine.sum_over_ranks(
                {
                    **{part: mine.parts[part] for part in ("loss", *part_names(stage.losses))},
                    "tokens": mine.num_tokens, "positions": mine.num_positions, "stop": float(stop.event.is_set()),
                }
            )  # fmt: skip
            tokens, positions, asked = (sums.pop(name) for name in ("tokens", "positions", "stop"))
            journal.count(tokens, positions, sums)
            _refuse_explosion(sums["loss"], watch, mine, step)
            watch.add(sums["loss"])
            held_out: dict[str, float] = {}
            keeps = stage.checkpoints is not None and (step % stage.checkpoints.every == 0 or step == last)
            if keeps and setup.held_out is not None:
                held_out = held_out_losses(setup, setup.held_out)
            if (step - 1) % stage.log_every == 0 or step == last or held_out:
                memory = engine.max_over_ranks({"bytes": peak_memory_bytes(engine.process.device)})
                final = sums
                journal.write(step, sums, held_out, lr=lr, update=mine.update, memory_bytes=int(memory["bytes"]))
            if keeps:
                best = setup.checkpoints.keep(step, held_out, best, last=step == last)
            if step < last and (asked or (stage.save_every is not None and step % stage.save_every == 0)):
                notes = {"watch": watch.state(), "best": asdict(best) if best else None, "judge": judge}
                setup.state.save(engine, Progress(step, notes), average=average, keep=stage.keep_states)
            if step < last and asked:
                raise StageStopped(
                    stop.number or signal.SIGTERM,  # of another rank
                    f"stage {setup.name} was asked to stop after step {step} of {last}; all is saved, "
                    "and the same command goes on from there",
                )
    return Finished(done, final, best)


def _judge(stage: StageSection) -> dict[str, Any] | None:
    """What decides which checkpoint is the best one; a resumed run may have another."""
    section = stage.checkpoints
    return None if section is None else section.model_dump(mode="json", include={"splits", "samples", "metric"})


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of torch's generator in a step, below 2^64 whatever the seed; different steps and ranks have different ones."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def held_out_losses(setup: Setup, feed: Feed) -> dict[str, float]:
    """The loss and its parts on held-out samples, the same ones each time. A collective."""
    stage, engine, average = setup.stage, setup.engine, setup.checkpoints.average
    assert stage.checkpoints is not None
    size = min(stage.checkpoints.samples, len(feed.material.table))
    totals = dict.fromkeys(("loss", *part_names(stage.losses)), 0.0)
    with (
        feed.batches(stage, engine.process, size=size, steps=range(1), seed=0) as reader,
        engine.evaluating(),
        contextlib.nullcontext() if average is None else average.in_place(),
    ):
        for plan, batch in reader:
            output = engine.forward(batch.to(engine.process.device), plan.totals, plan.largest)
            for name in totals:
                totals[name] += float(output[name])
    return engine.sum_over_ranks(totals)


def optimizer_step(engine: Engine, items: Iterator[tuple[MicroPlan, Batch]], lr: float, step: int) -> Step:
    """Forward and backward passes of one rank, and an update of the weights. `step`: counted from 1.

    DivergedError: a loss or the gradient is no number.
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
    done = Step(
        parts={name: math.fsum(each[name] for each in parts) for name in parts[0]},
        micro_batches=[{"sample_ids": ids, "parts": each} for ids, each in zip(sample_ids, parts, strict=True)],
        num_tokens=num_tokens,
        num_positions=num_positions,
        update=update,
    )
    if update.applied and not math.isfinite(update.grad_norm):
        raise DivergedError(
            f"step {step}: the gradient is not finite though the loss is, in a batch with {_ids(done)}; "
            "lower stages.NAME.lr, or look at them",
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
                f"{shortened(ids)}; lower stages.NAME.lr, or look at these samples",
                batch={"step": step, "not_finite": broken, "micro_batches": [{"sample_ids": ids}]},
                everywhere=False,
            )


def _refuse_explosion(loss: float, watch: LossWatch, done: Step, step: int) -> None:
    limit = watch.limit()
    if limit is not None and loss > limit:
        raise DivergedError(
            f"step {step}: the loss is {loss:.4g}, which is above {limit:.4g} (stages.NAME.explosion_factor times "
            f"the median of the last {WINDOW} steps) and above all before, in a batch with {_ids(done)}; lower "
            "stages.NAME.lr, look at the samples, or raise explosion_factor",
            batch={"step": step, "loss": loss, "limit": limit, "micro_batches": done.micro_batches},
            everywhere=True,
        )


def _ids(done: Step) -> str:
    return shortened([each for micro in done.micro_batches for each in micro["sample_ids"]])
