"""Has a generating model answer samples. An answer keeps its token ids: its text may tokenise to others.

An answer that is empty, or does not end within `max_new_tokens` or the longest sequence, makes its sample an error.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from storage.errors import StillhouseError
from storage.records.records import SampleError
from teacher_dump.config import SamplingSection
from teacher_dump.data.conversation import GENERATED_IDS, QUESTION_KEY
from teacher_dump.data.partition import Part
from teacher_dump.data.sample import IMAGE_MARKER, Sample, SampleRefusedError, Turn

if TYPE_CHECKING:
    from teacher_dump.prompts.preparation import Preparer
    from teacher_dump.prompts.teacher_prompt import TeacherPrompt
    from teacher_dump.teachers.teacher import Generator

_log = logging.getLogger(__name__)
_SAMPLES_PER_CALL = 32  # of the engine
_SEED_BITS = 0x7FFF_FFFF  # engines take seeds of 31 bits


@dataclass(frozen=True)
class Answerer:
    """Has a generating model answer every question of a sample; its earlier answers are part of the prompt."""

    preparer: Preparer
    generator: Generator
    tokenizer: Any
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    sampling: SamplingSection
    vocab_size: int  # the tokenizer's real one; a padded head can generate larger ids
    speaker: str = "the teacher"  # who answers, for messages

    def answer_part(self, part: Part) -> Iterator[dict[str, Any]]:
        """Yields a part's samples as rows of a data set; a failed one has its reason in `refused`."""
        for error in part.errors:
            yield {"split": None, "id": error.sample_id, "refused": error.reason}
        for sample, outcome in zip(part.samples, self.answer_samples(part.samples), strict=True):
            question = {"split": sample.split, "id": sample.id, QUESTION_KEY: sample.key.as_json()}
            row = {**question, "category": sample.category}
            if isinstance(outcome, SampleError):
                yield {**row, "refused": outcome.reason}
            else:
                messages = [_make_message(turn) for turn in outcome.turns]
                yield {**row, "images": list(sample.images), "messages": messages}

    def answer_samples(self, samples: Sequence[Sample]) -> Iterator[Sample | SampleError]:
        """Yields each sample with generated answers, or its error, in order."""
        for start in range(0, len(samples), _SAMPLES_PER_CALL):
            yield from self.replace_answers(samples[start : start + _SAMPLES_PER_CALL])

    def replace_answers(self, samples: Sequence[Sample]) -> list[Sample | SampleError]:
        """Returns each sample with every answer replaced by a generated one, or its error, in order."""
        outcomes: list[Sample | SampleError] = list(samples)
        for number in range(max((len(sample.turns) for sample in samples), default=0)):
            asked: list[tuple[int, Sample, TeacherPrompt]] = []
            for place, sample in enumerate(outcomes):
                if isinstance(sample, SampleError) or number >= len(sample.turns):
                    continue
                if sample.turns[number].role == "assistant":
                    try:
                        asked.append((place, sample, self._make_prompt(sample, number)))
                    except SampleRefusedError as refusal:
                        outcomes[place] = SampleError(sample.id, str(refusal))
            seeds = [_derive_seed(self.sampling.seed, sample.id, number) for _, sample, _ in asked]
            answers = self._generate([prompt for _, _, prompt in asked], seeds)
            for (place, sample, _), answer in zip(asked, answers, strict=True):
                try:
                    if isinstance(answer, SampleRefusedError):
                        raise answer
                    turns, text = sample.turns, self._decode_answer(answer, number)
                    turn = replace(turns[number], text=text, token_ids=tuple(answer))
                    outcomes[place] = replace(sample, turns=(*turns[:number], turn, *turns[number + 1 :]))
                except SampleRefusedError as refusal:
                    outcomes[place] = SampleError(sample.id, str(refusal))
        return outcomes

    def _generate(self, prompts: Sequence[TeacherPrompt], seeds: Sequence[int]) -> list[list[int] | SampleRefusedError]:
        """Returns the tokens of each answer, or its error. If a call fails, tries its prompts one by one."""
        from teacher_dump.teachers.device_failure import PromptRefusedError, is_device_failure

        def generate(start: int, stop: int) -> list[list[int]]:
            return self.generator.generate(
                prompts[start:stop],
                sampling=self.sampling,
                seeds=seeds[start:stop],
                stop_ids=self.eos_token_ids,
                vocab_size=self.vocab_size,
            )

        try:
            return [*generate(0, len(prompts))]
        except Exception as error:  # an engine raises its own kinds
            if isinstance(error, StillhouseError) or is_device_failure(error):
                raise
            _log.warning("%s failed on %d prompts together: %s", self.speaker, len(prompts), error)
        answers: list[list[int] | SampleRefusedError] = []
        failure: Exception | None = None
        for at in range(len(prompts)):
            try:
                answers += generate(at, at + 1)
            except PromptRefusedError as error:
                answers.append(SampleRefusedError(f"{self.speaker} refuses this sample: {error}"))
            except Exception as error:
                if isinstance(error, StillhouseError) or is_device_failure(error):
                    raise
                failure = error
                answers.append(SampleRefusedError(f"{self.speaker} failed: {error}"))
        if failure is not None and len(answers) > 1 and all(isinstance(one, SampleRefusedError) for one in answers):
            raise StillhouseError(f"{self.speaker} fails on every prompt; {failure}") from failure
        return answers

    def _make_prompt(self, sample: Sample, number: int) -> TeacherPrompt:
        """Returns the prompt before the answer at turn `number`."""
        from teacher_dump.prompts.teacher_prompt import TeacherPrompt

        turns = (*sample.turns[:number], Turn("assistant", "", token_ids=self.eos_token_ids[:1]))
        has_markers = any(IMAGE_MARKER in turn.text for turn in sample.turns)
        shown = sum(turn.text.count(IMAGE_MARKER) for turn in turns) if has_markers else len(sample.images)
        prepared = self.preparer.prepare(replace(sample, turns=turns, images=sample.images[:shown]))
        return TeacherPrompt(prepared.record.token_ids[:-1], prepared.prompt.images)  # without the stop token

    def _decode_answer(self, token_ids: Sequence[int], number: int) -> str:
        answer = f"{self.speaker}'s answer at turn {number}"
        if not token_ids or token_ids[-1] not in self.eos_token_ids:
            if len(token_ids) >= self.sampling.max_new_tokens:
                limit = "data.sampling.max_new_tokens allows no more"
            else:
                limit = "teacher.max_length, or the model's own context, allows no longer sequence"
            raise SampleRefusedError(f"{answer} does not end within {len(token_ids)} tokens; {limit}")
        if max(token_ids) >= self.vocab_size:
            raise SampleRefusedError(f"{answer} holds token {max(token_ids)}, which the tokenizer does not have")
        if self.image_token_id in token_ids:
            raise SampleRefusedError(f"{answer} holds its own image token")
        text = self.tokenizer.decode(list(token_ids[:-1]), skip_special_tokens=False)
        if not text.strip():
            raise SampleRefusedError(f"{answer} is empty")
        return text


def _make_message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if not turn.is_trained:
        message["loss"] = False
    return message if turn.token_ids is None else {**message, GENERATED_IDS: list(turn.token_ids)}


def _derive_seed(seed: int, sample_id: str, turn: int) -> int:
    digest = hashlib.sha256(f"{seed}\0{sample_id}\0{turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & _SEED_BITS
