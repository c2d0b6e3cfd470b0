"""The special token ids at the start of a prompt, the same for the dump and for a student's inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def prepend_leading_ids(ids: Sequence[int], leading: Sequence[int]) -> list[int]:
    """Returns the ids of a prompt with `leading` in front, unless the chat template already wrote them."""
    return list(ids) if list(ids[: len(leading)]) == list(leading) else [*leading, *ids]


def find_leading_special_ids(tokenizer: Any) -> list[int]:
    """Returns the special ids that the tokenizer puts before any text, such as a beginning-of-sequence token."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []
