"""Trains one stage: loads the student, runs its steps, writes a checkpoint and a summary."""

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
from student_train.data.batch_schedule import count_micro_batches
from student_train.data.mixture import Mixture
from student_train.data.sample_images import TensorStore, VisionGatherer
from student_train.models.checkpoint import check_free_space, recover_checkpoint
from student_train.models.expert_parallel import check_ranks
from student_train.models.huggingface import is_empty_expert, is_llava
from student_train.models.loading import freeze, load_student
from student_train.models.lora import add_adapters
from student_train.models.parameter_groups import make_parameter_groups
from student_train.models.recomputation import enable_gradient_checkpointing
from student_train.models.sparse_upcycling import ExpertSettings, count_activated, is_sparse, route_in_float32, upcycle
from student_train.models.student import Student
from student_train.training.checkpoint_rotation import CheckpointRotation
from student_train.training.deepspeed_engine import Engine, Process, measure_peak_memory
from student_train.training.ema import WeightAverage
from student_train.training.init_making import list_init_parts
from student_train.training.loop import BatchFeed, StageSetup, run_steps
from student_train.training.loss_spikes import DivergedError
from student_train.training.objective import Objective
from student_train.training.resume import StageState
from student_train.training.stage_data import StageData, load_cached_teacher, select_samples_of_caches
from student_train.training.stage_inputs import write_record
from student_train.training.trackers import check_trackers

LOG_FILE = "deepspeed.log"
_log = logging.getLogger(__name__)
LOST_PEER_MESSAGES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's messages


class RankError(StillhouseError):
    """A failure that perhaps only this rank sees, so this rank must report it."""

    of_this_rank = True


def resolve_stage(stage: StageSection, name: str) -> StageSection:
    """Replace `{stage}` and `{seed}` in a stage's `output`, and `{seed}` in its `init`.

    ConfigError if `init` lies inside `output`, which the stage replaces, or if either replaces what `init` is made of.
    """
    seed = str(stage.seed)
    init = stage.init.replace("{seed}", seed)
    output = stage.output.replace("{stage}", name).replace("{seed}", seed)
    if Path(init).resolve().is_relative_to(Path(output).resolve()):
        raise ConfigError(
            f"stages.{name}: init is {init}, inside the stage's own output {output}, which the stage replaces; "
            "give another output, or copy the checkpoint elsewhere"
        )
    for part in list_init_parts(stage):
        if Path(part).resolve() in (Path(init).resolve(), Path(output).resolve()):
            raise ConfigError(
                f"stages.{name}: {part} is both what init is made from and the stage's init or output, which would "
                "replace it; give init and output folders of their own"
            )
    return stage.model_copy(update={"init": init, "output": output})


def compute_learning_rate(step: int, *, num_steps: int, peak: float, warmup_fraction: float) -> float:
    """Return the learning rate of a step, counted from 0: linear up to the peak, then half a cosine to 0."""
    num_warmup = math.ceil(warmup_fraction * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def count_steps(stage: StageSection, num_samples: int) -> int:
    """Return the number of optimizer steps: as given, or enough for the epochs."""
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    return max(1, math.ceil(stage.epochs * num_samples / stage.global_batch))


def make_held_out_stage(stage: StageSection, data: Mixture) -> StageSection | None:
    """Return the stage over its held-out samples; None if it has none. ConfigError: no cache has a held-out sample.

    `data`: the samples that it trains on. Caches without held-out samples are omitted.
    """
    if stage.checkpoints is None or not stage.checkpoints.splits:
        return None
    splits = {"splits": stage.checkpoints.splits}
    held = select_samples_of_caches([source.cache for source in data.sources], stage.checkpoints.splits)
    caches = stage.caches and tuple(
        each.model_copy(update=splits) for each, indices in zip(stage.caches, held, strict=True) if len(indices)
    )
    return stage.model_copy(update={**splits, "caches": caches})


def train(
    stage: StageSection,
    name: str,
    stage_data: StageData,
    process: Process,
    *,
    inputs: Mapping[str, Any],
    started: float,
    held_out: StageData | None = None,
) -> Path:
    """Train a resolved stage to its end; return the output folder, which then holds a checkpoint.

    `inputs`: of `collect_stage_inputs`, stored in the folder and in states. `started`: time.monotonic() from which
    summary.json counts seconds. `held_out`: data of the stage of `make_held_out_stage`. A process may train several
    stages in turn. Errors: StillhouseError; RankError for failures that perhaps only this rank sees, such as a broken
    image or a loss that is not finite.
    """
    check_trackers(stage.track)
    check_ranks(process.num_ranks, stage.expert_parallel, stage=name)
    output = Path(stage.output)
    if process.is_first:
        for note in stage_data.checkpoint.notes:
            _log.warning("stage %s: %s", name, note)
        recover_checkpoint(output)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"stages.{name}.output is {output}: it cannot be created: {error.strerror}; give another output"
            ) from error
        for stale in (output / "summary.json", output / "evaluation.json", *output.glob("diverged-*.json")):
            stale.unlink(missing_ok=True)
        write_record(output, inputs)
    torch.manual_seed(stage.seed)
    model = load_student(stage_data.checkpoint, precision=stage.precision, device=process.device)
    model = _prepare_model(model, stage)
    sizes = _count_parameters(model)
    if process.is_first:  # fails now, not after hours of training, if the disk is too small
        check_free_space(sizes["num_parameters"] * next(model.parameters()).element_size(), output)
    # Ranks that shard parameters (ZeRO-3) must call the tower together, even if features are known.
    keeps_features = "vision" not in stage.train and stage.zero_stage < 3
    half = (stage.memory_mb << 20) // 2
    features = TensorStore(half) if keeps_features else None
    pixels = TensorStore(0 if keeps_features else half)
    identity = stage_data.mixture.identity
    student = Student(model, vocab_size=identity.vocab_size, image_token_id=identity.image_token_id, features=features)
    average = None if stage.ema is None else WeightAverage(model, stage.ema)
    engine = Engine(
        Objective(
            student,
            stage.losses,
            load_cached_teacher(stage_data, stage.losses).to(process.device),
            chunk_logits=stage.chunk_logits,
        ),
        make_parameter_groups(model, lr=stage.lr, module_lr=stage.module_lr, weight_decay=stage.weight_decay),
        stage,
        process,
        num_micro=count_micro_batches(stage.global_batch, stage.micro_batch, num_ranks=process.num_ranks),
        log_path=output / LOG_FILE,
        decoder=model.config.get_text_config(),
    )

    def make_feed(data: StageData) -> BatchFeed:
        images = data.mixture.images(stage_data.checkpoint.image_processor)
        return BatchFeed(data, VisionGatherer(images, features=features, pixels=pixels))

    steps = count_steps(stage, len(stage_data.table))
    setup = StageSetup(
        stage=stage,
        name=name,
        num_steps=steps,
        learning_rate=partial(
            compute_learning_rate, num_steps=steps, peak=stage.lr, warmup_fraction=stage.warmup_fraction
        ),
        engine=engine,
        training=make_feed(stage_data),
        held_out=None if held_out is None else make_feed(held_out),
        checkpoints=CheckpointRotation(
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
        with hold_signals(second_raises=False) as stop:  # torchrun repeats its signals
            finished = run_steps(setup, stop)
            setup.checkpoints.finish()
            peak = engine.max_over_ranks({"bytes": measure_peak_memory(process.device)})
            if process.is_first:
                trained = {"steps": steps, "num_samples_trained": steps * stage.global_batch}
                run = {"stage": name, "seed": stage.seed, **trained}
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
        stop.raise_interrupted()  # a signal that came too late to stop before the end
    except ConfigError:
        raise
    except DivergedError as error:
        path = output / f"diverged-{process.rank}.json"
        try:
            write_json(path, error.batch)
            message = f"{error} (the whole batch is in {path})"
        except WriteError as unwritten:
            message = f"{error} ({unwritten})"
        raise StillhouseError(message) if error.everywhere else RankError(message) from error
    except StillhouseError as error:
        raise RankError(str(error)) from error
    except RuntimeError as error:
        if process.num_ranks == 1 or not any(sign in str(error) for sign in LOST_PEER_MESSAGES):
            raise
        raise RankError(f"rank {process.rank}: another rank has stopped; see its message for the reason") from error
    finally:
        engine.close()
    return output


def _prepare_model(model: Any, stage: StageSection) -> Any:
    """Prepare a loaded student for training: upcycle it, freeze modules, add adapters, enable checkpointing."""
    if stage.moe is not None:
        experts = ExpertSettings(stage.moe.experts, stage.moe.top_k, stage.moe.every)
        model = upcycle(model, experts, seed=stage.seed)
    if is_llava(model.config) and is_sparse(model.config):
        route_in_float32(model)
    freeze(model, [module for module in stage.train if module != "llm" or stage.lora is None])
    if stage.lora is not None:
        add_adapters(model, stage.lora)
    if stage.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def _count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Count the checkpoint's parameters, before ranks shard them."""
    held = {name: p for name, p in model.named_parameters() if not is_empty_expert(name, model.config)}
    sizes = {name: p.numel() for name, p in held.items()}
    return {
        "num_parameters": sum(sizes.values()),
        "num_activated_parameters": count_activated(model.config, sizes),
        "num_trained_parameters": sum(sizes[name] for name, p in held.items() if p.requires_grad),
    }
