"""Engines that are wrong in the ways that engines are, and a caller that loads them in this process instead of Ray's.

A stand-in for vLLM is transformers with its states changed, so every test knows by how much they are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from teacher_dump.execution.worker_setup import make_reference_settings, make_worker_settings
from teacher_dump.planning.dump_plan import DumpPlan
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.settings import DumpSettings
from teacher_dump.teachers.teacher import Teacher, TeacherStates
from teacher_dump.teachers.transformers_teacher import TransformersTeacher
from teacher_dump.workers.worker import WorkerSettings, open_scorer

Change = Callable[[TeacherPrompt, Tensor], Tensor]
NOISE = 0.13  # of a hidden state; about 0.05 nats a row with the tiny teacher's head


def keep(prompt: TeacherPrompt, states: Tensor) -> Tensor:
    return states


def shift_by_a_row(prompt: TeacherPrompt, states: Tensor) -> Tensor:
    return torch.cat([states[:1], states[:-1]])


def leave_out_the_norm(prompt: TeacherPrompt, states: Tensor) -> Tensor:
    """States before the last norm have another length in every row."""
    draw = torch.Generator().manual_seed(len(states))
    return states * (0.3 + 2 * torch.rand(len(states), 1, generator=draw))


def subtract_the_mean(prompt: TeacherPrompt, states: Tensor) -> Tensor:
    """A layer norm in the place of an RMS norm."""
    return torch.nn.functional.layer_norm(states, states.shape[1:])


def add_noise(prompt: TeacherPrompt, states: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(len(states))
    return states + NOISE * torch.randn(states.shape, generator=draw)


def add_noise_to_several_images(prompt: TeacherPrompt, states: Tensor) -> Tensor:
    return add_noise(prompt, states) if len(prompt.images) > 1 else states


def overflow(prompt: TeacherPrompt, states: Tensor) -> Tensor:
    return states.masked_fill(torch.ones_like(states) > 0, torch.inf)


class ChangedEngine:
    """Another engine whose states are changed; with `refuses`, prompts of several images are errors."""

    def __init__(self, engine: Teacher, change: Change, *, refuses: bool = False) -> None:
        self._engine = engine
        self._change = change
        self._refuses = refuses

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        if self._refuses and any(len(prompt.images) > 1 for prompt in prompts):
            raise ValueError("at most 1 image may be given")
        found = self._engine.hidden_states(prompts)
        return [
            replace(states, hidden=self._change(prompt, states.hidden))
            for prompt, states in zip(prompts, found, strict=True)
        ]


@dataclass
class LocalCaller:
    """Calls functions with a teacher in this process; `calls` says which teachers were loaded, in order."""

    change: Change = keep
    refuses: bool = False
    fails_in_model: BaseException | None = None  # raised in the place of the second process's work
    calls: list[str] = field(default_factory=list)

    def __call__(
        self,
        planned: DumpPlan,
        settings: DumpSettings,
        function: Callable[..., Any],
        argument: Any,
        *,
        is_reference: bool = False,
    ) -> Any:
        self.calls.append("model" if is_reference else "engine")
        if is_reference and self.fails_in_model is not None:
            raise self.fails_in_model
        worker = make_reference_settings(make_worker_settings(planned, settings))
        return function(open_scorer(worker, None if is_reference else self.open_engine), argument)

    def open_engine(self, worker: WorkerSettings) -> Teacher:
        engine = TransformersTeacher(
            worker.checkpoint, dtype=worker.dtype, image_token_id=worker.facts.image_token_id, settings={}
        )
        return ChangedEngine(engine, self.change, refuses=self.refuses)
