"""The interface between the dump and an inference engine: prompts in, final hidden states out.

Legend: t positions of the expanded prompt, visual tokens included; d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from teacher_dump.config import SamplingSection
from teacher_dump.prompts.teacher_prompt import TeacherPrompt


@dataclass(frozen=True, eq=False)
class TeacherStates:
    """A teacher's hidden states for one prompt."""

    token_ids: NDArray[np.int64]  # (t,) of the engine, image tokens expanded
    hidden: Float[Tensor, "t d"]  # after the last norm: the output head's input


class Teacher(Protocol):
    """An engine with a loaded teacher, which computes hidden states."""

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        """Computes the states of each prompt, in order. Raises the engine's errors; the engine stays usable."""
        ...


@runtime_checkable
class ShowsPixels(Protocol):
    """An engine that exposes the pixel values of its own processor."""

    def pixel_values(self, prompt: TeacherPrompt) -> list[Tensor | None]:
        """Returns the pixel values of each image of a prompt; None if they are not a single tensor."""
        ...


class Generator(Protocol):
    """An engine with a loaded teacher, which generates answers."""

    def generate(
        self,
        prompts: Sequence[TeacherPrompt],
        *,
        sampling: SamplingSection,
        seeds: Sequence[int],
        stop_ids: Sequence[int],
        vocab_size: int,
    ) -> list[list[int]]:
        """Generates the tokens after each prompt, up to and including a stop token; without one, they were cut off.

        An answer depends only on its own prompt and seed. Ids from `vocab_size` on, which only a padded head has, are
        suppressed as far as the engine can.
        """
        ...
