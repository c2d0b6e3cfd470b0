"""Samples: one conversation each, about any number of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from storage.errors import StillhouseError

Role = Literal["system", "user", "assistant"]


class SampleRefusedError(StillhouseError):
    """One sample that cannot be used; the message is the reason that its SampleError carries."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, its text as the data has it, `<image>` markers included."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation about any number of images."""

    id: str
    split: str
    category: str  # "" where the data names none
    images: tuple[str, ...]  # paths relative to the image root, forward slashes
    turns: tuple[Turn, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, for a fingerprint or another process."""
        return {
            "id": self.id,
            "split": self.split,
            "category": self.category,
            "images": list(self.images),
            "turns": [[turn.role, turn.text] for turn in self.turns],
        }

    @staticmethod
    def from_json(row: dict[str, Any]) -> Sample:
        """The inverse of `as_json`."""
        turns = tuple(Turn(role, text) for role, text in row["turns"])
        return Sample(row["id"], row["split"], row["category"], tuple(row["images"]), turns)
