"""What makes a stage's `init`, if the stage says how: a composition or a pruning."""

from __future__ import annotations

from student_train.config import StageSection
from student_train.models.compose import check_composition, list_parts
from student_train.models.prune import check_pruning


def list_init_parts(stage: StageSection) -> tuple[str, ...]:
    """Return the checkpoints that a stage makes its `init` from; none if it does not make it."""
    if stage.compose is not None:
        return list_parts(stage.compose)
    return () if stage.prune is None else (stage.prune.model,)


def check_init_making(stage: StageSection, place: str) -> str:
    """Check that a stage can make its `init`, without reading weights; return a line that says so.

    `place`: prefix of messages. Errors: ConfigError.
    """
    if stage.compose is not None:
        check_composition(stage.compose, place)
        return "the parts of compose fit together"
    assert stage.prune is not None
    check_pruning(stage.prune, place)
    return f"{stage.prune.model} can be pruned so"
