"""Classifies failures of an engine and its device: cured by a new process, or caused by a single prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from storage.errors import StillhouseError

# A CUDA error persists in its process. Ranks of an engine report theirs as text, in a RuntimeError.
_DEAD_KINDS = ("AcceleratorError", "EngineDeadError", "DistBackendError")
_DEAD_TEXT = re.compile(
    r"CUDA error|CUDA driver error|HIP error|CUBLAS_STATUS_|CUDNN_STATUS_|NCCL error|Triton Error|"
    r"Executor failed|RPC call to \w+ timed out|EngineCore encountered"
)
_MEMORY_TEXT = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)


class PromptRefusedError(Exception):
    """An engine refuses one prompt because of its content; the engine stays usable."""


class DeviceLostError(StillhouseError):
    """This process can no longer use its engine or its device; a new process may."""


def is_device_failure(error: BaseException) -> bool:
    """Returns whether this process must end before its device can be used again."""
    return any(
        isinstance(link, DeviceLostError)
        or (not is_out_of_memory(link) and (_list_class_names(link) & {*_DEAD_KINDS} or _has_text(link, _DEAD_TEXT)))
        for link in _iterate_causes(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an allocation failed, on a device or in main memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _has_text(error, _MEMORY_TEXT)


def free_memory() -> None:
    """Releases memory that is cached for later allocations. Call it outside of an `except` block.

    A traceback keeps the tensors of its frames alive.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _has_text(error: BaseException, pattern: re.Pattern[str]) -> bool:
    return isinstance(error, RuntimeError | TimeoutError) and pattern.search(str(error)) is not None


def _list_class_names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, its cause or context, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
