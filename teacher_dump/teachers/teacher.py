"""The seam between the dump and an inference engine: prompts in, final hidden states out.

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
    """What a teacher computed for one prompt."""

    token_ids: NDArray[np.int64]  # (t,) as the engine saw them, image tokens expanded
    hidden: Float[Tensor, "t d"]  # after the last norm: the output head's input


class Teacher(Protocol):
    """An engine with a teacher loaded."""

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        """The states of each prompt, in order. Raises whatever the engine raises; the engine stays usable."""
        ...


@runtime_checkable
class ShowsPixels(Protocol):
    """An engine that tells what its own processor makes of images."""

    def pixel_values(self, prompt: TeacherPrompt) -> list[Tensor | None]:
        """Of each image of a prompt; None where they are in no single tensor."""
        ...


class Generator(Protocol):
    """An engine with a teacher loaded that writes answers."""

    def generate(
        self,
        prompts: Sequence[TeacherPrompt],
        *,
        sampling: SamplingSection,
        seeds: Sequence[int],
        stop_ids: Sequence[int],
        vocab_size: int,
    ) -> list[list[int]]:
        """The tokens that follow each prompt, the stop token that ends them last; without one, they were cut off.

        An answer depends on its own prompt and seed. Ids from `vocab_size` on, which only the rows of a padded head
        have, are not said as far as the engine can leave them out.
        """
        ...
