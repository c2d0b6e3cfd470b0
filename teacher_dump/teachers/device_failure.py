"""Failures of an engine and its device: which ones a new process can mend, and which are a single prompt's fault."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from storage.errors import StillhouseError

# A CUDA error stays in the process that met it. Ranks of an engine report theirs as text, in a RuntimeError.
_DEAD_KINDS = ("AcceleratorError", "EngineDeadError", "DistBackendError")
_DEAD_TEXT = re.compile(
    r"CUDA error|CUDA driver error|HIP error|CUBLAS_STATUS_|CUDNN_STATUS_|NCCL error|Triton Error|"
    r"Executor failed|RPC call to \w+ timed out|EngineCore encountered"
)
_MEMORY_TEXT = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)


class PromptRefusedError(Exception):
    """An engine refuses one prompt for what is in it; the engine stays usable."""


class DeviceLostError(StillhouseError):
    """This process can no longer use its engine or its device; a new process may."""


def is_device_failure(error: BaseException) -> bool:
    """Whether the process that met this error has to end before its device can be used again."""
    return any(
        isinstance(link, DeviceLostError)
        or (not is_out_of_memory(link) and (_kinds(link) & {*_DEAD_KINDS} or _has_text(link, _DEAD_TEXT)))
        for link in _chain(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or in main memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _has_text(error, _MEMORY_TEXT)


def free_memory() -> None:
    """Give the device back what is cached for later allocations. Call it outside of an `except` block.

    A traceback keeps the tensors of its frames.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _has_text(error: BaseException, pattern: re.Pattern[str]) -> bool:
    return isinstance(error, RuntimeError | TimeoutError) and pattern.search(str(error)) is not None


def _kinds(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and what it was raised from while being handled."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
