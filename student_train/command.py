"""The command line of student_train/main.py: reads sections, trains, evaluates, speaks to a person."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from storage.config import CacheSection
from storage.disk import describe_full_disk
from storage.errors import ConfigError, StillhouseError
from storage.sections import Named, Sections, read_sections
from storage.stop_signals import exit_code, explain, interruptible
from storage.supervisor import die_with_parent
from student_train.config import EvaluationSection, StageSection

SCHEMAS = {"cache": CacheSection, "stages": Named(StageSection), "evaluation": EvaluationSection}


def main(arguments: Sequence[str], *, started: float) -> int:
    """Train the stage that the command line names; returns the exit code. `started`: of time.monotonic().

    SIGTERM and SIGINT save a state and end it with 143 or 130; before the first step there is nothing to save.
    """
    parser = argparse.ArgumentParser(prog="student_train/main.py", description="Train one stage.")
    parser.add_argument("file", help="pipeline.yaml")
    parser.add_argument("--stage", required=True, help="a name below `stages:`")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the checkpoint afterwards")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take the cores from other ranks
    is_first = os.environ.get("RANK", "0") == "0"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this rank, which must not train on without it
        die_with_parent()
    try:
        with interruptible():
            sections = read_sections(options.file, SCHEMAS, options.overrides)
            train(sections, options.stage, evaluate=options.evaluate, started=started)
    except KeyboardInterrupt as stop:
        if is_first:
            sys.stderr.write(f"{explain(stop)}\n")
        return exit_code(stop)
    except StillhouseError as error:
        if is_first or getattr(error, "of_this_rank", False):
            sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except Exception as error:  # a disk may be full wherever a library writes
        message = describe_full_disk(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        return 1
    return 0


def train(sections: Sections, name: str, *, evaluate: bool, started: float) -> None:
    """Train the stage of that name, and evaluate it on the first rank. Errors: StillhouseError."""
    stages = sections["stages"]
    if name not in stages:
        known = ", ".join(stages) or "no stages"
        raise ConfigError(f"{sections.path}: there is no stage {name!r}; the file has {known}")
    from student_train import (
        trainer,
    )  # torch and transformers: seconds, which a misspelt name should not cost
    from student_train.composition import ensure_composed
    from student_train.engine import this_process
    from student_train.material import prepare, samples_of_any

    stage = trainer.resolved(stages[name], name)
    cache_path = sections["cache"].path
    process = this_process()
    if stage.compose is not None:
        ensure_composed(stage.compose, stage.init, seed=stage.seed, is_first=process.is_first)
    material = prepare(stage, cache_path)
    if evaluate:  # hours of training should not end at a misspelt split
        samples_of_any([source.cache for source in material.data.sources], sections["evaluation"].splits)
    aside = trainer.held_out_stage(stage, material.data)
    held_out = None if aside is None else prepare(aside, cache_path)
    output = trainer.train(stage, name, material, process, started=started, held_out=held_out)
    if evaluate and process.is_first:
        from student_train.evaluation import evaluate_model

        evaluate_model(output, stage.sources(cache_path), sections["evaluation"])
