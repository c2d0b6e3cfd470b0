"""An open teacher: asked about many samples at once, and about each by itself where that fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from storage.errors import StillhouseError
from storage.records.records import SampleError
from teacher_dump.prompts.preparation import Prepared
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.teachers.device_failure import (
    DeviceLostError,
    PromptRefusedError,
    free_memory,
    is_device_failure,
    is_out_of_memory,
)
from teacher_dump.teachers.teacher import Teacher, TeacherStates

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedTeacher:
    """A loaded teacher and its output head."""

    engine: Teacher
    head: OutputHead

    def hidden_states(
        self, samples: Sequence[Prepared], errors: list[SampleError]
    ) -> tuple[list[Prepared], list[Tensor]]:
        """The samples that the teacher took and their hidden states, (T, d) each; the others become errors.

        An error is a sample that the engine fails on by itself, or whose images it expands in another way than the
        processor does. StillhouseError: it fails on each of several samples, for another reason than what is in them.
        DeviceLostError: this process is of no more use.
        """
        taken: list[Prepared] = []
        hidden: list[Tensor] = []
        for sample, states in self._asked(samples, errors):
            difference = sample.expansion.difference(states.token_ids)
            if difference:
                errors.append(SampleError(sample.record.sample_id, difference))
            else:
                taken.append(sample)
                hidden.append(states.hidden)
        return taken, hidden

    def _asked(self, samples: Sequence[Prepared], errors: list[SampleError]) -> list[tuple[Prepared, TeacherStates]]:
        """What the engine answers. When a call fails, its samples are tried one by one."""
        try:
            return list(zip(samples, self.engine.hidden_states([sample.prompt for sample in samples]), strict=True))
        except Exception as error:  # an engine raises its own kinds, and one sample must not cost the others
            _raise_if_fatal(error)
            _log.warning("the teacher failed on %d samples together: %s", len(samples), error)
            is_memory = is_out_of_memory(error)
        if is_memory:
            free_memory()
        answered: list[tuple[Prepared, TeacherStates]] = []
        failures: list[Exception] = []
        reasons: list[SampleError] = []
        for sample in samples:
            try:
                answered.append((sample, self.engine.hidden_states([sample.prompt])[0]))
            except Exception as error:
                _raise_if_fatal(error)
                refuses = "refuses this sample" if isinstance(error, PromptRefusedError) else "failed"
                failures.append(error)
                reasons.append(SampleError(sample.record.sample_id, f"the teacher {refuses}: {error}"))
        others = [at for at, failure in enumerate(failures) if not isinstance(failure, PromptRefusedError)]
        if not answered and len(failures) > 1 and others:
            if is_out_of_memory(failures[others[0]]):
                raise DeviceLostError(
                    f"the teacher fails on every sample for want of memory; {reasons[others[0]]}"
                ) from failures[others[0]]
            raise StillhouseError(f"the teacher fails on every sample; {reasons[others[0]]}")
        errors += reasons
        return answered


def _raise_if_fatal(error: Exception) -> None:
    """Raises what no other sample would change."""
    if isinstance(error, StillhouseError):
        raise error
    if is_device_failure(error):
        raise DeviceLostError(f"the teacher's device failed: {error}") from error
