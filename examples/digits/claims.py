"""What can be claimed of a mosaic wrongly: yes/no questions about digits that may be absent, plausible misreadings.

The questions are POPE's (arXiv 2305.10355) in small: half of each kind have the answer yes, and a kind is a way to
choose the digit that a question with the answer no is about. POPE's "popular" has no counterpart, since all digits
are equally frequent.
"""

from __future__ import annotations

import numpy as np

from examples.digits.mosaics import PLACES, WORDS, Originals

KINDS = ("exists_random", "exists_alike", "place_swapped")


def lookalikes(originals: Originals) -> list[list[int]]:
    """For every digit the nine others, the most similar mean scan first."""
    means = np.stack([originals.images[originals.labels == digit].mean(0).ravel() for digit in range(10)])
    distances = ((means[:, None] - means[None]) ** 2).sum(-1)
    return [
        [int(other) for other in row.argsort(kind="stable") if other != digit] for digit, row in enumerate(distances)
    ]


def ask_whether(kind: str, digits: np.ndarray, alike: list[list[int]], rng: np.random.Generator) -> tuple[str, str]:
    """A question of `kind` about a mosaic's four digits, and "yes" or "no", either equally likely.

    exists_random: a no is about any digit that is not there; exists_alike: about the absent one that looks most like
    a digit that is there; place_swapped: about a digit's place, a no names one that stands elsewhere in the mosaic.
    """
    truth = bool(rng.integers(2))
    place = int(rng.integers(4))
    present = {int(digit) for digit in digits}
    digit = int(digits[place])
    if kind == "place_swapped":
        others = sorted(present - {digit}) or alike[digit][:1]  # four equal digits: one in ten thousand
        shown = digit if truth else int(rng.choice(others))
        return f"Is there {_a(WORDS[shown])} at the {PLACES[place]}?", "yes" if truth else "no"
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    absent = [other for other in alike[digit] if other not in present]
    wrong = absent[0] if kind == "exists_alike" else int(rng.choice(sorted(absent)))
    return f"Is there {_a(WORDS[digit if truth else wrong])} in the picture?", "yes" if truth else "no"


def misread(words: list[str], alike: list[list[int]], rng: np.random.Generator) -> list[str]:
    """An answer with one digit taken for one of the three that look most like it; yes and no change places."""
    if words in (["yes"], ["no"]):
        return ["no" if words == ["yes"] else "yes"]
    index = int(rng.choice([place for place, word in enumerate(words) if word in WORDS]))
    wrong = alike[WORDS.index(words[index])][int(rng.integers(3))]
    return [*words[:index], WORDS[wrong], *words[index + 1 :]]


def _a(word: str) -> str:
    return f"an {word}" if word.startswith("e") else f"a {word}"
