"""A loaded teacher: computes hidden states for many samples at once, or one by one if that fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from storage.errors import StillhouseError
from storage.records.records import SampleError
from teacher_dump.prompts.preparation import PreparedSample
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.signals.states import SampleStates
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
class ScoredSamples:
    """The samples that a teacher accepted, with their hidden states, and errors of the others."""

    accepted: tuple[SampleStates, ...]
    errors: tuple[SampleError, ...]


@dataclass(frozen=True, eq=False)
class LoadedTeacher:
    """A loaded teacher and its output head."""

    engine: Teacher
    head: OutputHead

    def hidden_states(self, samples: Sequence[PreparedSample]) -> ScoredSamples:
        """Computes the hidden states of samples; none are asked of the engine if there are no samples.

        A sample is an error if the engine fails on it alone, or expands its images differently than the processor.
        Raises StillhouseError if the engine fails on each of several samples for a reason other than their content;
        DeviceLostError if this process can no longer use its device.
        """
        accepted: list[SampleStates] = []
        errors: list[SampleError] = []
        for sample, answer in self._call_engine(samples):
            if isinstance(answer, SampleError):
                errors.append(answer)
            elif difference := sample.expansion.describe_difference(answer.token_ids):
                errors.append(SampleError(sample.record.sample_id, difference))
            else:
                accepted.append((sample, answer.hidden))
        return ScoredSamples(tuple(accepted), tuple(errors))

    def _call_engine(
        self, samples: Sequence[PreparedSample]
    ) -> list[tuple[PreparedSample, TeacherStates | SampleError]]:
        """Returns the engine's states. If a call fails, tries its samples one by one."""
        if not samples:
            return []
        try:
            return list(zip(samples, self.engine.hidden_states([sample.prompt for sample in samples]), strict=True))
        except Exception as error:  # an engine raises its own kinds, and one sample must not cost the others
            _raise_if_fatal(error)
            _log.warning("the teacher failed on %d samples together: %s", len(samples), error)
            is_memory = is_out_of_memory(error)
        if is_memory:
            free_memory()
        answers: list[tuple[PreparedSample, TeacherStates | SampleError]] = []
        failures: list[tuple[Exception, TeacherStates | SampleError]] = []
        for sample in samples:
            try:
                answers.append((sample, self.engine.hidden_states([sample.prompt])[0]))
            except Exception as error:
                _raise_if_fatal(error)
                refuses = "refuses this sample" if isinstance(error, PromptRefusedError) else "failed"
                answers.append((sample, SampleError(sample.record.sample_id, f"the teacher {refuses}: {error}")))
                failures.append((error, answers[-1][1]))
        others = [failure for failure in failures if not isinstance(failure[0], PromptRefusedError)]
        if len(failures) == len(samples) > 1 and others:
            error, reason = others[0]
            if is_out_of_memory(error):
                raise DeviceLostError(f"the teacher fails on every sample for want of memory; {reason}") from error
            raise StillhouseError(f"the teacher fails on every sample; {reason}")
        return answers


def _raise_if_fatal(error: Exception) -> None:
    """Raises errors that would occur with any sample."""
    if isinstance(error, StillhouseError):
        raise error
    if is_device_failure(error):
        raise DeviceLostError(f"the teacher's device failed: {error}") from error
