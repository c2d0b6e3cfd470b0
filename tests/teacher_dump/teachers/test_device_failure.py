"""A failing device, a lack of memory or a failed call costs as few samples and processes as possible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from storage.errors import StillhouseError
from storage.selection import TopK
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.ray_jobs.device_record import LOSSES_IN_A_ROW, DeviceRecord
from teacher_dump.signals.lm_head import ChunkSize, OutputHead
from teacher_dump.signals.row_selector import RowSelector
from teacher_dump.signals.spec import RowRequest
from teacher_dump.teachers.device_failure import (
    DeviceLostError,
    PromptRefusedError,
    is_device_failure,
    is_out_of_memory,
)
from teacher_dump.teachers.teacher import TeacherStates
from teacher_dump.teachers.transformers_teacher import TransformersTeacher
from teacher_dump.teachers.vllm_teacher import call_engine
from tests.teacher_dump.conftest import WriteConfig
from tests.teacher_dump.scorers import EVERYTHING, make_scorer, part_of, reference_teacher

REPOSITORY = Path(__file__).parents[3]
PATIENCE_S = 400


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "is_device", "is_memory"),
    [
        (torch.AcceleratorError("CUDA error: ECC"), True, False),
        (raised(StillhouseError("vLLM cannot serve x"), torch.AcceleratorError("CUDA error")), True, False),
        (RuntimeError("Worker failed with error 'CUDA error: device-side assert triggered'"), True, False),
        (RuntimeError("Executor failed."), True, False),
        (type("EngineDeadError", (Exception,), {})("dead"), True, False),
        (TimeoutError("RPC call to execute_model timed out."), True, False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False, True),
        (MemoryError(), False, True),
        (ValueError("At most 1 image(s)"), False, False),
        (ValueError("a prompt that says CUDA error: out of memory"), False, False),
        (RuntimeError("shape '[3]' is invalid"), False, False),
    ],
)
def test_failures_are_classified(error: Exception, is_device: bool, is_memory: bool) -> None:
    assert is_device_failure(error) == is_device
    assert is_out_of_memory(error) == is_memory


class FakeLLM:
    """A small vllm.LLM: it caches images before the engine has them, and a failed request may stay for ever."""

    def __init__(self) -> None:
        self.request_counter = SimpleNamespace(counter=0)
        self.llm_engine = self
        self.remembered: set[str] = set()
        self.received: set[str] = set()
        self.requests: set[str] = set()
        self.resets: list[str] = []
        self.is_dead = False

    def encode(self, pictures: Sequence[str]) -> list[str]:
        if self.is_dead:
            raise RuntimeError("no answer")
        if self.requests:
            pytest.fail(f"requests were left, which the engine waits for without end: {self.requests}")
        is_new = {picture: picture not in self.remembered for picture in pictures}
        self.remembered |= {picture for picture in pictures if picture}
        if "two" in pictures:
            raise type("VLLMValidationError", (type("VLLMClientError", (Exception,), {}),), {})("At most 1 image(s)")
        for picture in pictures:
            self.requests.add(str(self.request_counter.counter))
            self.request_counter.counter += 1
            if picture and not is_new[picture] and picture not in self.received:
                raise RuntimeError(f"{picture} is not in the receiver's cache")
            self.received.add(picture)
        self.requests.clear()
        return list(pictures)

    def abort_request(self, request_ids: Sequence[str]) -> None:
        self.requests -= set(request_ids)

    def reset_mm_cache(self) -> None:
        self.remembered.clear()
        self.received.clear()

    def reset_encoder_cache(self) -> None:
        self.resets.append("encoder")

    def reset_prefix_cache(self) -> None:
        self.resets.append("prefix")


def ask(engine: FakeLLM, *pictures: str) -> list[str]:
    return call_engine(engine, lambda: engine.encode(pictures), probe=lambda: engine.encode([""]))


def test_a_failed_call_leaves_an_engine_as_it_was() -> None:
    engine = FakeLLM()
    assert ask(engine, "one") == ["one"]
    with pytest.raises(PromptRefusedError, match="At most 1 image"):
        ask(engine, "red", "two", "blue")
    assert ask(engine, "red") == ["red"]
    assert ask(engine, "blue", "one") == ["blue", "one"]
    engine.remembered.add("lost")  # by whatever accident
    with pytest.raises(RuntimeError, match="lost is not in the receiver"):
        ask(engine, "red", "lost")
    assert ask(engine, "lost") == ["lost"]
    assert engine.resets == ["encoder", "prefix"] * 2


def test_an_engine_that_does_not_recover_is_lost() -> None:
    engine = FakeLLM()
    engine.is_dead = True
    with pytest.raises(DeviceLostError, match="does not recover from a failed call: no answer"):
        ask(engine, "red")

    def fail() -> list[str]:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")

    with pytest.raises(DeviceLostError, match=r"failed: CUDA error: unspecified launch failure$"):
        call_engine(engine, fail, probe=lambda: pytest.fail("a lost device is not asked again"))


class FailingTeacher:
    """A teacher that raises the error that `failure` returns for the prompts, if any."""

    def __init__(
        self, teacher: TransformersTeacher, failure: Callable[[Sequence[TeacherPrompt]], Exception | None]
    ) -> None:
        self._teacher = teacher
        self._failure = failure

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        error = self._failure(prompts)
        if error is not None:
            raise error
        return self._teacher.hidden_states(prompts)


@pytest.fixture(scope="module")
def reference(tiny_teacher: Path) -> TransformersTeacher:
    return reference_teacher(tiny_teacher)


def test_refused_prompts_are_errors_of_their_samples_even_where_all_are_refused(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    engine = FailingTeacher(reference, lambda prompts: PromptRefusedError("At most 1 image(s) may be provided"))
    scored = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, engine).score(part_of(tiny_data, limit=4))
    assert [error.reason for error in scored.records.errors] == [
        "the teacher refuses this sample: At most 1 image(s) may be provided"
    ] * 4
    assert scored.records.tokens == []


def test_a_call_without_memory_is_tried_sample_by_sample(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    part = part_of(tiny_data, limit=4)

    def together(prompts: Sequence[TeacherPrompt]) -> Exception | None:
        return torch.OutOfMemoryError("CUDA out of memory") if len(prompts) > 1 else None

    scorer = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, FailingTeacher(reference, together))
    assert len(scorer.score(part).records.tokens) == 4
    never = FailingTeacher(reference, lambda prompts: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(DeviceLostError, match=r"for want of memory.*CUDA out of memory"):
        make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, never).score(part)


def test_a_lost_device_is_no_error_of_any_sample(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    asked = []

    def fail(prompts: Sequence[TeacherPrompt]) -> Exception:
        asked.append(len(prompts))
        return RuntimeError("Executor failed.")

    scorer = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, FailingTeacher(reference, fail))
    with pytest.raises(DeviceLostError, match="Executor failed"):
        scorer.score(part_of(tiny_data, limit=4))
    assert asked == [4]  # and it is not asked sample by sample


class ShortOfMemory(OutputHead):
    """A head without memory for more than so many rows."""

    most: int = 0
    asked: list[int]

    def logits(self, hidden: Tensor) -> Tensor:
        self.asked.append(len(hidden))
        if len(hidden) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")
        return super().logits(hidden)


def short_of_memory(most: int) -> Any:
    kind: Any = type("Short", (ShortOfMemory,), {"most": most, "asked": []})
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    return kind(weight, chunk_size=ChunkSize(16))


def test_a_lack_of_memory_halves_the_rows_at_once_for_good() -> None:
    head, hidden = short_of_memory(8), torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    plain = OutputHead(head.weight, chunk_size=ChunkSize(16))
    request = RowRequest(TopK(5), seed=0)
    found, expected = (
        RowSelector(one, "response", request).select({"a": hidden}, labels=torch.arange(20), sums_tails=True)
        for one in (head, plain)
    )
    assert head.asked == [16, 8, 8, 4]
    np.testing.assert_array_equal(found.rows[0].ids, expected.rows[0].ids)
    np.testing.assert_allclose(found.rows[0].logprobs, expected.rows[0].logprobs, atol=1e-6)
    assert found.tail is not None
    assert expected.tail is not None
    np.testing.assert_allclose(found.tail.total, expected.tail.total, rtol=1e-5)  # the failed attempt adds nothing
    head.asked.clear()
    logprobs = head.compute_label_logprobs(hidden, torch.arange(20))
    assert head.asked == [8, 8, 4]
    torch.testing.assert_close(logprobs, plain.compute_label_logprobs(hidden, torch.arange(20)))


def test_a_second_lack_of_memory_is_raised() -> None:
    head = short_of_memory(3)
    with pytest.raises(torch.OutOfMemoryError):
        head.compute_label_logprobs(torch.zeros(20, 8), torch.arange(20))
    assert head.asked == [16, 8]


def test_the_dump_ends_when_every_device_fails_again_and_again() -> None:
    record = DeviceRecord()
    for device in ("a", "b"):
        record.begin(device)
    assert not any(record.note_loss("a") for _ in range(10 * LOSSES_IN_A_ROW))  # b works
    assert [record.note_loss("b") for _ in range(LOSSES_IN_A_ROW)] == [False] * (LOSSES_IN_A_ROW - 1) + [True]
    record.note_part("b")
    assert not record.note_loss("b")
    assert not any(record.note_loss("b", num_parts=1) for _ in range(10 * LOSSES_IN_A_ROW))  # each does some work


def dump(config: Path, kind: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.teacher_dump.failing_engines", str(config), kind],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_dump_survives_a_device_that_fails_until_its_process_ends(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(dump={"samples_per_part": 12, "blind_check_samples": 0})
    assert dump(config, "third") == {"failure": "", "parts": [0, 1]}
    assert len(list((tmp_path / "runs/tiny/logs").glob("teacher-*"))) == 2  # processes, each good for two calls


@pytest.mark.slow
def test_a_device_that_always_fails_ends_the_dump_in_one_sentence(write_config: WriteConfig, tmp_path: Path) -> None:
    said = dump(write_config(dump={"blind_check_samples": 0}), "always")
    assert said["parts"] == []
    assert "the teacher's device fails again and again (3 processes in a row on each device" in said["failure"]
    assert "CUDA error: an illegal memory access" in said["failure"]
    assert "Traceback" not in said["failure"]
    assert len(list((tmp_path / "runs/tiny/logs").glob("teacher-*"))) == LOSSES_IN_A_ROW
