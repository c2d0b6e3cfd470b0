"""What can be claimed of a mosaic wrongly: yes/no questions about digits that may be absent, plausible misreadings.

The questions are POPE's (arXiv 2305.10355) in small: half of each kind have the answer yes, and a kind is a way to
choose the digit that a question with the answer no is about. POPE's "popular" has no counterpart, since all digits
are equally frequent. A model of a few layers learns none of them alone: a checklist of all digits, ten verdicts in
one answer and always in the same order, teaches it first what is there, and then it answers about one digit too.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from examples.digits.mosaics import WORDS, Originals

KINDS = ("exists_random", "exists_alike")
CHECKLIST = "checklist"  # the category of these questions


def lookalikes(originals: Originals) -> list[list[int]]:
    """For every digit the nine others, the most similar mean scan first."""
    means = np.stack([originals.images[originals.labels == digit].mean(0).ravel() for digit in range(10)])
    distances = ((means[:, None] - means[None]) ** 2).sum(-1)
    return [
        [int(other) for other in row.argsort(kind="stable") if other != digit] for digit, row in enumerate(distances)
    ]


@dataclass(frozen=True)
class Claim:
    """The question whether a digit is in a mosaic, and what is seen there in reading order."""

    asked: int
    seen: tuple[int, ...]

    @property
    def question(self) -> str:
        word = WORDS[self.asked]
        return f"Is there {'an' if word.startswith('e') else 'a'} {word} in the picture?"

    @property
    def answer(self) -> str:
        """The digit's word and the verdict: "seven no". The verdict follows the word as in a checklist."""
        return _verdict(self.asked, self.seen)

    def misread(self, alike: list[list[int]], rng: np.random.Generator) -> Claim:
        """The same with the other verdict: a digit taken for the one asked for, or that one overlooked."""
        if self.asked in self.seen:
            seen = tuple(alike[self.asked][int(rng.integers(3))] if each == self.asked else each for each in self.seen)
        else:
            nearest = min(range(len(self.seen)), key=lambda place: alike[self.seen[place]].index(self.asked))
            seen = (*self.seen[:nearest], self.asked, *self.seen[nearest + 1 :])
        return replace(self, seen=seen)


def ask_whether(kind: str, digits: np.ndarray, alike: list[list[int]], rng: np.random.Generator) -> Claim:
    """A question of `kind` about a mosaic's four digits, whose answer is yes or no, either equally likely.

    exists_random: a no is about any digit that is not there; exists_alike: about the absent one that looks most like
    a digit that is there.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    truth = bool(rng.integers(2))
    seen = tuple(int(digit) for digit in digits)
    digit = seen[int(rng.integers(4))]
    absent = [other for other in alike[digit] if other not in seen]
    wrong = absent[0] if kind == "exists_alike" else int(rng.choice(sorted(absent)))
    return Claim(digit if truth else wrong, seen)


def checklist(digits: np.ndarray, rng: np.random.Generator) -> tuple[str, str, str]:
    """The question which digits are there, all ten verdicts from zero to nine, and these with one of them wrong."""
    seen = {int(digit) for digit in digits}
    right, wrong = (
        " ".join(_verdict(digit, those) for digit in range(10)) for those in (seen, seen ^ {int(rng.integers(10))})
    )
    return "Which digits are in the picture?", right, wrong


def _verdict(digit: int, seen: Collection[int]) -> str:
    return f"{WORDS[digit]} {'yes' if digit in seen else 'no'}"


def misread(words: list[str], alike: list[list[int]], rng: np.random.Generator) -> list[str]:
    """An answer with one digit taken for one of the three that look most like it."""
    index = int(rng.choice([place for place, word in enumerate(words) if word in WORDS]))
    wrong = alike[WORDS.index(words[index])][int(rng.integers(3))]
    return [*words[:index], WORDS[wrong], *words[index + 1 :]]
