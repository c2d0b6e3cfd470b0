"""A loaded teacher: computes hidden states for many samples at once, or one by one if that fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from storage.errors import StillhouseError
from storage.records.records import SampleError
from teacher_dump.prompts.preparation import PreparedSample
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
        self, samples: Sequence[PreparedSample], errors: list[SampleError]
    ) -> tuple[list[PreparedSample], list[Tensor]]:
        """Returns the accepted samples and their hidden states, (T, d) each; adds the others to `errors`.

        A sample is an error if the engine fails on it alone, or expands its images differently than the processor.
        Raises StillhouseError if the engine fails on each of several samples for a reason other than their content;
        DeviceLostError if this process can no longer use its device.
        """
        taken: list[PreparedSample] = []
        hidden: list[Tensor] = []
        for sample, states in self._call_engine(samples, errors):
            difference = sample.expansion.describe_difference(states.token_ids)
            if difference:
                errors.append(SampleError(sample.record.sample_id, difference))
            else:
                taken.append(sample)
                hidden.append(states.hidden)
        return taken, hidden

    def _call_engine(
        self, samples: Sequence[PreparedSample], errors: list[SampleError]
    ) -> list[tuple[PreparedSample, TeacherStates]]:
        """Returns the engine's states. If a call fails, tries its samples one by one."""
        try:
            return list(zip(samples, self.engine.hidden_states([sample.prompt for sample in samples]), strict=True))
        except Exception as error:  # an engine raises its own kinds, and one sample must not cost the others
            _raise_if_fatal(error)
            _log.warning("the teacher failed on %d samples together: %s", len(samples), error)
            is_memory = is_out_of_memory(error)
        if is_memory:
            free_memory()
        answered: list[tuple[PreparedSample, TeacherStates]] = []
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
    """Raises errors that would occur with any sample."""
    if isinstance(error, StillhouseError):
        raise error
    if is_device_failure(error):
        raise DeviceLostError(f"the teacher's device failed: {error}") from error
