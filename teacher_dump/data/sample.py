"""Samples: one conversation each, with any number of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from storage.errors import StillhouseError
from storage.records.sample_key import SampleKey

Role = Literal["system", "user", "assistant"]

IMAGE_MARKER = "<image>"  # LLaVA's, in the text of a turn
MAX_SHOWN = 60  # characters of a user's value in a reason


def shorten(value: Any) -> str:
    """Returns a value's repr for an error message, at most `MAX_SHOWN` characters of it."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    cut = value[: MAX_SHOWN + 1] if isinstance(value, str | list | tuple) else value
    shown = repr(cut)
    if len(shown) <= MAX_SHOWN and cut == value:
        return shown
    size = f" ({len(value):,} characters)" if isinstance(value, str) else ""
    return f"{shown[: MAX_SHOWN - 1]}…{size}"


class SampleRefusedError(StillhouseError):
    """Refuses one sample; the message becomes the reason of its SampleError."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, its text as the data has it, `<image>` markers included."""

    role: Role
    text: str
    is_trained: bool = True  # of an answer: whether its tokens are labels
    token_ids: tuple[int, ...] | None = None  # of an answer that the teacher generated, its stop token last

    def as_json(self) -> list[Any]:
        """Returns plain data, without defaults at its end."""
        row: list[Any] = [self.role, self.text]
        if self.token_ids is not None:
            return [*row, self.is_trained, list(self.token_ids)]
        return row if self.is_trained else [*row, False]

    @staticmethod
    def from_json(row: list[Any]) -> Turn:
        """Inverts `as_json`."""
        role, text, is_trained, ids = [*row, *(True, None)[len(row) - 2 :]]
        return Turn(role, text, is_trained, None if ids is None else tuple(ids))


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation with any number of images."""

    key: SampleKey
    split: str
    category: str  # "" where the data names none
    images: tuple[str, ...]  # paths relative to the image root, forward slashes
    turns: tuple[Turn, ...]  # of a caption the answer alone

    @property
    def is_caption(self) -> bool:
        """Whether the sample is images and their text, without a question."""
        return len(self.turns) == 1 and self.turns[0].role == "assistant"

    @property
    def id(self) -> str:
        """The key's text, unique over all sources."""
        return self.key.sample_id

    def as_json(self) -> dict[str, Any]:
        """Returns plain data, for a fingerprint or another process."""
        return {
            "key": self.key.as_json(),
            "split": self.split,
            "category": self.category,
            "images": list(self.images),
            "turns": [turn.as_json() for turn in self.turns],
        }

    @staticmethod
    def from_json(row: dict[str, Any]) -> Sample:
        """Inverts `as_json`."""
        turns = tuple(Turn.from_json(turn) for turn in row["turns"])
        return Sample(SampleKey(*row["key"]), row["split"], row["category"], tuple(row["images"]), turns)
