"""Composes the model whose tokenizer and template a dump needs, where a stage of the same file composes it.

A recipe that trains a teacher begins with a cache of token ids, made with the processor of the composed model.
"""

from __future__ import annotations

from pathlib import Path

from stillhouse.config import Experiment
from student_train.models.compose import ensure_composed
from student_train.training.trainer import resolve_stage


def find_composed_teacher(experiment: Experiment) -> str | None:
    """The stage that composes teacher.model, if that is not there yet."""
    if Path(experiment.teacher.model).is_dir():
        return None
    for name, section in experiment.stages.items():
        if section.compose is not None and Path(resolve_stage(section, name).init) == Path(experiment.teacher.model):
            return name
    return None


def compose_teacher(experiment: Experiment) -> None:
    """Composes teacher.model where a stage says how and it is not there yet. Errors as `ensure_composed`."""
    name = find_composed_teacher(experiment)
    if name is None:
        return
    stage = resolve_stage(experiment.stages[name], name)
    assert stage.compose is not None
    print(f"composing {stage.init}, as stage {name} says", flush=True)  # takes minutes
    ensure_composed(stage.compose, stage.init, seed=stage.seed)
