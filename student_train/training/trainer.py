"""Trains one stage: makes the student, runs its steps, leaves a checkpoint and a summary."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from storage.backends.folder import write_json
from storage.errors import ConfigError, StillhouseError, WriteError
from storage.identity import stored_pixels, stored_template_arguments
from storage.processes.stop_signals import hold_signals
from student_train.config import StageSection
from student_train.data.batch_schedule import num_micro_batches
from student_train.data.mixture import Mixture
from student_train.data.sample_images import FeatureStore, VisionSource
from student_train.models.checkpoint import check_room, put_back
from student_train.models.expert_parallel import check_ranks
from student_train.models.huggingface import holds_nothing, is_llava
from student_train.models.loading import freeze, load_student
from student_train.models.lora import add_adapters
from student_train.models.parameter_groups import parameter_groups
from student_train.models.recomputation import enable_gradient_checkpointing
from student_train.models.sparse_upcycling import Experts, is_sparse, num_activated, route_in_float32, upcycled
from student_train.models.student import Student
from student_train.training.checkpoint_rotation import KeptCheckpoints
from student_train.training.deepspeed_engine import Engine, Process, peak_memory_bytes
from student_train.training.ema import WeightAverage
from student_train.training.loop import Feed, Setup, run_steps
from student_train.training.loss_spikes import DivergedError
from student_train.training.objective import Objective
from student_train.training.resume import StageState
from student_train.training.stage_data import Material, cached_teacher, samples_of_any
from student_train.training.stage_inputs import write_record
from student_train.training.trackers import check_trackers

LOG_FILE = "deepspeed.log"
_log = logging.getLogger(__name__)
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words


class RankError(StillhouseError):
    """A failure that this rank alone may see, so that this rank has to report it."""

    of_this_rank = True


def resolved(stage: StageSection, name: str) -> StageSection:
    """The stage with `{stage}` and `{seed}` in `output`, and `{seed}` in `init`, replaced.

    ConfigError if it starts from what it will replace.
    """
    seed = str(stage.seed)
    init = stage.init.replace("{seed}", seed)
    output = stage.output.replace("{stage}", name).replace("{seed}", seed)
    if Path(init).resolve().is_relative_to(Path(output).resolve()):
        raise ConfigError(
            f"stages.{name}: init is {init}, inside of the stage's own output, {output}, which it will replace; "
            "give another output, or copy the checkpoint elsewhere"
        )
    return stage.model_copy(update={"init": init, "output": output})


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


def held_out_stage(stage: StageSection, data: Mixture) -> StageSection | None:
    """The stage over its held-out samples, if it asks for any. ConfigError: none of its caches has one.

    `data`: what it trains on. A cache without held-out samples is left out.
    """
    if stage.checkpoints is None or not stage.checkpoints.splits:
        return None
    splits = {"splits": stage.checkpoints.splits}
    held = samples_of_any([source.cache for source in data.sources], stage.checkpoints.splits)
    caches = stage.caches and tuple(
        each.model_copy(update=splits) for each, indices in zip(stage.caches, held, strict=True) if len(indices)
    )
    return stage.model_copy(update={**splits, "caches": caches})


def train(
    stage: StageSection,
    name: str,
    material: Material,
    process: Process,
    *,
    inputs: Mapping[str, Any],
    started: float,
    held_out: Material | None = None,
) -> Path:
    """Train a resolved stage to its end; returns the output folder, which then holds a checkpoint.

    `inputs`: of `stage_inputs`, kept in the folder and in states. `started`: time.monotonic() from which summary.json
    counts seconds. `held_out`: of `held_out_stage`. A process
    may train several stages in turn. Errors: StillhouseError; RankError for what only this rank may have seen, such
    as a broken image or a loss that is no number.
    """
    check_trackers(stage.track)
    check_ranks(process.num_ranks, stage.expert_parallel, stage=name)
    output = Path(stage.output)
    if process.is_first:
        for note in material.checkpoint.notes:
            _log.warning("stage %s: %s", name, note)
        put_back(output)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"stages.{name}.output is {output}: no folder can be made there: {error.strerror}"
            ) from error
        for stale in (output / "summary.json", output / "evaluation.json", *output.glob("diverged-*.json")):
            stale.unlink(missing_ok=True)
        write_record(output, inputs)
    torch.manual_seed(stage.seed)
    model = load_student(material.checkpoint, precision=stage.precision, device=process.device)
    model = _made_ready(model, stage)
    sizes = _sizes(model)
    if process.is_first:  # hours of training should not end at a disk that was too small from the start
        check_room(sizes["num_parameters"] * next(model.parameters()).element_size(), output)
    # Ranks that share parameters (ZeRO-3) must call the tower together, known features or not.
    keeps_features = "vision" not in stage.train and stage.zero_stage < 3
    half = (stage.memory_mb << 20) // 2
    features = FeatureStore(half) if keeps_features else None
    pixels = FeatureStore(0 if keeps_features else half)
    identity = material.data.identity
    student = Student(model, vocab_size=identity.vocab_size, image_token_id=identity.image_token_id, features=features)
    average = None if stage.ema is None else WeightAverage(model, stage.ema)
    engine = Engine(
        Objective(
            student,
            stage.losses,
            cached_teacher(material, stage.losses).to(process.device),
            chunk_logits=stage.chunk_logits,
        ),
        parameter_groups(model, lr=stage.lr, module_lr=stage.module_lr, weight_decay=stage.weight_decay),
        stage,
        process,
        num_micro=num_micro_batches(stage.global_batch, stage.micro_batch, num_ranks=process.num_ranks),
        log_path=output / LOG_FILE,
        decoder=model.config.get_text_config(),
    )

    def feed(of: Material) -> Feed:
        images = of.data.images(material.checkpoint.image_processor)
        return Feed(of, VisionSource(images, features=features, pixels=pixels))

    steps = num_steps(stage, len(material.table))
    setup = Setup(
        stage=stage,
        name=name,
        num_steps=steps,
        learning_rate=partial(learning_rate, num_steps=steps, peak=stage.lr, warmup_fraction=stage.warmup_fraction),
        engine=engine,
        training=feed(material),
        held_out=None if held_out is None else feed(held_out),
        checkpoints=KeptCheckpoints(
            engine,
            model,
            stage,
            average,
            stored_pixels(identity) if identity.image_token_id >= 0 else None,
            stored_template_arguments(identity),
        ),
        state=StageState.of(output, name, inputs, num_ranks=process.num_ranks),
    )
    try:
        with hold_signals(second_raises=False) as stop:  # torchrun repeats its own
            finished = run_steps(setup, stop)
            setup.checkpoints.finish()
            peak = engine.max_over_ranks({"bytes": peak_memory_bytes(process.device)})
            if process.is_first:
                run = {"stage": name, "seed": stage.seed, "steps": steps}
                cost = {
                    "seconds": round(time.monotonic() - started, 3),
                    "peak_memory_bytes": int(peak["bytes"]),
                    "num_processes": process.num_ranks,
                }
                ended = {"resumed_at": finished.resumed_at, "final": finished.losses}
                if finished.best is not None:
                    ended["best"] = asdict(finished.best)
                write_json(output / "summary.json", {**run, **sizes, **cost, **ended})
                setup.state.clear()
            engine.barrier()
        stop.raise_interrupted()  # it came too late to stop before the end
    except ConfigError:
        raise
    except DivergedError as error:
        path = output / f"diverged-{process.rank}.json"
        try:
            write_json(path, error.batch)
            message = f"{error} (all of them are in {path})"
        except WriteError as unwritten:
            message = f"{error} ({unwritten})"
        raise StillhouseError(message) if error.everywhere else RankError(message) from error
    except StillhouseError as error:
        raise RankError(str(error)) from error
    except RuntimeError as error:
        if process.num_ranks == 1 or not any(sign in str(error) for sign in PEER_IS_GONE):
            raise
        raise RankError(f"rank {process.rank}: another rank has stopped; its own message says why") from error
    finally:
        engine.close()
    return output


def _made_ready(model: Any, stage: StageSection) -> Any:
    """A student that was loaded, as it begins to train."""
    if stage.moe is not None:
        experts = Experts(stage.moe.experts, stage.moe.top_k, stage.moe.every)
        model = upcycled(model, experts, seed=stage.seed)
    if is_llava(model.config) and is_sparse(model.config):
        route_in_float32(model)
    freeze(model, [module for module in stage.train if module != "llm" or stage.lora is None])
    if stage.lora is not None:
        add_adapters(model, stage.lora)
    if stage.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def _sizes(model: torch.nn.Module) -> dict[str, int]:
    """Parameters that the checkpoint holds, before ranks divide them."""
    held = {name: p for name, p in model.named_parameters() if not holds_nothing(name, model.config)}
    sizes = {name: p.numel() for name, p in held.items()}
    return {
        "num_parameters": sum(sizes.values()),
        "num_activated_parameters": num_activated(model.config, sizes),
        "num_trained_parameters": sum(sizes[name] for name, p in held.items() if p.requires_grad),
    }
