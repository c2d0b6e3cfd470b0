"""Token ids at the start of a prompt, the same for the dump and for whoever asks a student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def prepend_leading_ids(ids: Sequence[int], leading: Sequence[int]) -> list[int]:
    """The ids of a rendered prompt, after the `leading` ones unless the chat template wrote them already."""
    return list(ids) if list(ids[: len(leading)]) == list(leading) else [*leading, *ids]


def find_leading_special_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before any text, such as a beginning-of-sequence token; not what it puts after it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return dressed[:start]
    return []
