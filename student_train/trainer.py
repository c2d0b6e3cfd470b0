"""The stage loop: reads ahead, steps, logs, stops at a loss that is no number, saves."""

from __future__ import annotations

import itertools
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from storage.batches import read_ahead
from storage.errors import ConfigError, StillhouseError
from student_train.batch import Batch, collate
from student_train.checkpoint import save_checkpoint
from student_train.config import StageSection
from student_train.documents import MetricsLog, write_json
from student_train.engine import Engine, Process
from student_train.huggingface import holds_nothing
from student_train.images import FeatureStore, VisionSource
from student_train.loader import MicroPlan, ReadAhead, num_micro_batches, plans
from student_train.material import Material, cached_teacher, loss_families
from student_train.models import freeze, load_student
from student_train.objective import Objective, part_names
from student_train.sparse_upcycling import Experts, num_activated, upcycled
from student_train.stage_state import StageState, StoppedError, StopRequest
from student_train.student import Student

LOG_FILE = "deepspeed.log"
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words


class RankError(StillhouseError):
    """A failure that this rank alone may see, so that this rank has to report it."""

    of_this_rank = True


def resolved(stage: StageSection, name: str) -> StageSection:
    """The stage with `{stage}` and `{seed}` in `output`, and `{seed}` in `init`, replaced."""
    seed = str(stage.seed)
    return stage.model_copy(
        update={
            "init": stage.init.replace("{seed}", seed),
            "output": stage.output.replace("{stage}", name).replace("{seed}", seed),
        }
    )


def learning_rate(step: int, *, num_steps: int, peak: float, warmup_fraction: float) -> float:
    """Of an optimizer step counted from 0: linear up to the peak, then half a cosine towards 0."""
    num_warmup = math.ceil(warmup_fraction * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def num_steps(stage: StageSection, num_samples: int) -> int:
    """Optimizer steps: as given, or enough for the epochs."""
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    return max(1, math.ceil(stage.epochs * num_samples / stage.global_batch))


def train(stage: StageSection, name: str, material: Material, process: Process, *, started: float) -> Path:
    """Train a resolved stage to its end; returns the output folder, which then holds a checkpoint.

    `started`: time.monotonic() from which summary.json counts seconds. A process may train several stages in
    turn. Errors: StillhouseError; RankError for what only this rank may have seen, such as a broken image or a
    loss that is no number.
    """
    output = Path(stage.output)
    if process.is_first:
        output.mkdir(parents=True, exist_ok=True)
        for stale in ("summary.json", "evaluation.json"):
            (output / stale).unlink(missing_ok=True)
    torch.manual_seed(stage.seed)
    model = load_student(material.checkpoint, precision=stage.precision, device=process.device)
    if stage.moe is not None:
        experts = Experts(stage.moe.experts, stage.moe.top_k, stage.moe.every)
        model = upcycled(model, experts, seed=stage.seed)
    freeze(model, stage.train)
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Ranks that share parameters (ZeRO-3) must call the tower together, known features or not.
    keeps_features = "vision" not in stage.train and stage.zero_stage < 3
    half = (stage.memory_mb << 20) // 2
    features = FeatureStore(half) if keeps_features else None
    identity = material.data.identity
    student = Student(model, vocab_size=identity.vocab_size, image_token_id=identity.image_token_id, features=features)
    vision = VisionSource(
        material.data.images(material.checkpoint.image_processor),
        features=features,
        pixels=FeatureStore(0 if keeps_features else half),
    )
    engine = Engine(
        Objective(
            student,
            stage.losses,
            cached_teacher(material, stage.losses).to(process.device),
            chunk_logits=stage.chunk_logits,
        ),
        stage,
        process,
        num_micro=num_micro_batches(stage.global_batch, stage.micro_batch, num_ranks=process.num_ranks),
        log_path=output / LOG_FILE,
    )
    state = StageState.of(stage, material.fingerprint(), num_ranks=process.num_ranks)
    try:
        done = state.resume(engine)
        final = _loop(engine, stage, name, material, vision, state, done)
        weights = engine.state_dict(model)
        peak = engine.max_over_ranks({"bytes": peak_memory_bytes(process.device)})
        if process.is_first:
            save_checkpoint(model, output, stage.init, state_dict=weights)
            run = {"stage": name, "seed": stage.seed, "steps": num_steps(stage, len(material.table))}
            cost = {
                "seconds": round(time.monotonic() - started, 3),
                "peak_memory_bytes": int(peak["bytes"]),
                "num_processes": process.num_ranks,
            }
            write_json(output / "summary.json", {**run, **_sizes(model), **cost, "resumed_at": done, "final": final})
            state.clear()
        engine.barrier()
    except (StoppedError, ConfigError):
        raise
    except StillhouseError as error:
        raise RankError(str(error)) from error
    except RuntimeError as error:
        if process.num_ranks == 1 or not any(sign in str(error) for sign in PEER_IS_GONE):
            raise
        raise RankError(f"rank {process.rank}: another rank has stopped; its own message says why") from error
    finally:
        engine.close()
    return output


def _sizes(model: torch.nn.Module) -> dict[str, int]:
    """Parameters that the checkpoint holds, whole ones where ZeRO-3 leaves this rank a piece."""
    held = {name: p for name, p in model.named_parameters() if not holds_nothing(name, model.config)}
    sizes = {name: int(getattr(p, "ds_numel", p.numel())) for name, p in held.items()}
    return {
        "num_parameters": sum(sizes.values()),
        "num_activated_parameters": num_activated(model.config, sizes),
        "num_trained_parameters": sum(sizes[name] for name, p in held.items() if p.requires_grad),
    }


def _loop(
    engine: Engine,
    stage: StageSection,
    name: str,
    material: Material,
    vision: VisionSource,
    state: StageState,
    done: int,
) -> dict[str, float]:
    """The steps that are not done; returns the last logged loss parts. StoppedError: SIGTERM came, all is saved."""
    process, total_steps = engine.process, num_steps(stage, len(material.table))
    micro_plans = plans(
        material.table, stage.global_batch, stage.micro_batch, steps=range(done, total_steps), seed=stage.seed,
        rank=process.rank, num_ranks=process.num_ranks,
    )  # fmt: skip
    names = part_names(stage.losses)
    log = MetricsLog(Path(stage.output) / "metrics.jsonl" if process.is_first else None, resumed_at=done)
    bar = tqdm(
        total=total_steps, initial=done, desc=name, unit="step", disable=not process.is_first,
        mininterval=1.0 if sys.stderr.isatty() else 10.0,
    )  # fmt: skip
    final: dict[str, float] = {}
    families, grid = loss_families(stage.losses), material.checkpoint.grid
    micro_plans, ahead, epochs = itertools.tee(micro_plans, 3)
    samples = read_ahead(
        material.data,
        (material.table.indices[plan.rows].ravel() for plan in ahead),
        draw_sets=(plan.step * stage.global_batch // len(material.table) for plan in epochs),
    )
    reader = ReadAhead(
        (plan, collate(records, grid, vision.gather, families=families, counted=plan.counted))
        for plan, records in zip(micro_plans, samples, strict=True)
    )
    with bar, log, reader, StopRequest(engine) as stop:
        items = iter(reader)
        last_logged, logged_at = done - 1, time.monotonic()
        for step in range(done, total_steps):
            torch.manual_seed((stage.seed << 40) + (step << 16) + process.rank)  # of dropout: the same when resumed
            lr = learning_rate(step, num_steps=total_steps, peak=stage.lr, warmup_fraction=stage.warmup_fraction)
            parts, norm = _step(engine, items, lr, step)
            if step % stage.log_every == 0 or step == total_steps - 1:
                means = engine.sum_over_ranks({part: parts[part] for part in ("loss", *names)})
                now = time.monotonic()
                rate = (step - last_logged) * stage.global_batch / max(now - logged_at, 1e-9)
                last_logged, logged_at, final = step, now, means
                log.write({"step": step + 1, **means, "lr": lr, "grad_norm": norm, "samples_per_s": rate})
                bar.set_postfix({part: f"{value:.3f}" for part, value in means.items()}, refresh=False)
            bar.update()
            asked, last = stop.heard(), step == total_steps - 1
            if not last and (asked or (stage.save_every is not None and (step + 1) % stage.save_every == 0)):
                state.save(engine, step + 1, keep=stage.keep_states)
                if asked:
                    raise StoppedError(
                        f"stage {name} was asked to stop after step {step + 1} of {total_steps}; all is saved, "
                        "and the same command goes on from there"
                    )
    return final


def _step(
    engine: Engine, items: Iterator[tuple[MicroPlan, Batch]], lr: float, step: int
) -> tuple[dict[str, float], float]:
    """One optimizer step; returns this rank's loss parts and the gradient's norm."""
    outputs: list[Mapping[str, torch.Tensor]] = []
    sample_ids: list[tuple[str, ...]] = []
    norm = None
    while norm is None:
        plan, batch = next(items)
        output = engine.forward(batch.to(engine.process.device), plan.totals, plan.largest)
        engine.backward(output["loss"])
        outputs.append({name: value.detach().float() for name, value in output.items()})
        sample_ids.append(batch.sample_ids)
        if plan.micro == plan.num_micro - 1:
            _refuse_non_finite(outputs, sample_ids, step)
        norm = engine.step(lr)
    parts = {name: math.fsum(float(each[name]) for each in outputs) for name in outputs[0]}
    if not math.isfinite(norm):
        raise StillhouseError(
            f"step {step + 1}: the gradient is not finite though the loss is, in a batch with "
            f"{_shortened([each for ids in sample_ids for each in ids])}; lower stages.NAME.lr, or look at them"
        )
    return parts, norm


def _refuse_non_finite(outputs: list[Mapping[str, torch.Tensor]], sample_ids: list[tuple[str, ...]], step: int) -> None:
    for parts, ids in zip(outputs, sample_ids, strict=True):
        broken = [name for name, value in parts.items() if not torch.isfinite(value)]
        if broken:
            shown = ", ".join(f"{name} is {float(parts[name])}" for name in broken)
            raise StillhouseError(
                f"step {step + 1}: {shown} on the samples {_shortened(ids)}; "
                "lower stages.NAME.lr, or look at these samples"
            )


def _shortened(ids: tuple[str, ...] | list[str]) -> str:
    return ", ".join(ids[:32]) + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
