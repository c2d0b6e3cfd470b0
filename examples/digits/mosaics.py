"""Two-by-two mosaics of handwritten digits, and questions about them whose answers need seeing.

The digits are the 1,797 8×8 scans that scikit-learn ships (UCI Optical Recognition of Handwritten
Digits). A fixed 15 % of every class is held out: validation mosaics use only one half of those originals, test mosaics
only the other.
Legend: m mosaics, o originals; a mosaic is 32×32 grey pixels, four cells of 16×16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CELL_PIXELS = 16
CELL = (CELL_PIXELS, CELL_PIXELS)
PLACES = ("top left", "top right", "bottom left", "bottom right")
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip
Split = Literal["train", "validation", "test"]
CATEGORIES = ("place", "read", "caption", "sum")


@dataclass(frozen=True)
class Originals:
    """Digit scans of one side of the split: images float32 (o, 8, 8) in [0, 1], labels (o,)."""

    images: np.ndarray
    labels: np.ndarray


def load_originals(split: Split) -> Originals:
    """The scans of one split: a fixed random 15 % of every class is held out, half of it for validation."""
    shuffle = np.random.default_rng(1797)
    digits: Any = load_digits()
    images, labels = np.asarray(digits.images, np.float32) / 16, np.asarray(digits.target)
    chosen = []
    for label in range(10):
        indices = shuffle.permutation(np.flatnonzero(labels == label))
        cut = len(indices) - round(len(indices) * 0.15)
        middle = (cut + len(indices)) // 2
        chosen.append({"train": indices[:cut], "validation": indices[cut:middle], "test": indices[middle:]}[split])
    order = np.concatenate(chosen)
    return Originals(images=images[order], labels=labels[order])


def draw_cell(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One 16×16 cell: the scan enlarged, slightly turned, scaled, moved and dimmed. (8, 8) -> uint8 (16, 16)."""
    angle, scale = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(0.88, 1.12)
    shift_x, shift_y = rng.uniform(-1.2, 1.2, size=2)
    cos, sin, centre = np.cos(angle) / scale, np.sin(angle) / scale, (CELL_PIXELS - 1) / 2
    matrix = (
        cos, sin, centre - cos * (centre + shift_x) - sin * (centre + shift_y),
        -sin, cos, centre + sin * (centre + shift_x) - cos * (centre + shift_y),
    )  # fmt: skip
    enlarged = Image.fromarray((scan * 255).astype(np.uint8)).resize(CELL, Image.Resampling.BICUBIC)
    turned = enlarged.transform(CELL, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)
    return (np.asarray(turned, np.float32) * rng.uniform(0.75, 1)).astype(np.uint8)


def draw_mosaics(originals: Originals, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless mosaics: (uint8 (32, 32) pixels, int (4,) digits in reading order), classes equally likely."""
    by_label = [np.flatnonzero(originals.labels == label) for label in range(10)]
    while True:
        digits = rng.integers(0, 10, size=4)
        cells = [draw_cell(originals.images[rng.choice(by_label[digit])], rng) for digit in digits]
        yield np.block([[cells[0], cells[1]], [cells[2], cells[3]]]), digits


def ask(category: str, digits: np.ndarray, rng: np.random.Generator) -> tuple[str, list[str], int]:
    """A question of `category`, its answer as words, and the number of words that may be asked for.

    The third value is the size of the vocabulary a wrong word is drawn from (10 digits or 19 sums).
    """
    names = [WORDS[digit] for digit in digits]
    match category:
        case "place":
            place = int(rng.integers(4))
            return f"Which digit is at the {PLACES[place]}?", [names[place]], 10
        case "read":
            return "Read the digits row by row.", names, 10
        case "caption":
            top, bottom = f"{names[0]} and {names[1]}", f"{names[2]} and {names[3]}"
            return "Describe the picture.", f"The top row shows {top} and the bottom row shows {bottom}".split(), 10
        case "sum":
            row = int(rng.integers(2))
            total = int(digits[2 * row] + digits[2 * row + 1])
            return f"What is the sum of the {('top', 'bottom')[row]} row?", [WORDS[total]], 19
        case _:
            raise ValueError(f"category is {category!r}, expected one of {', '.join(CATEGORIES)}")


def miswrite(words: list[str], num_choices: int, rng: np.random.Generator) -> list[str]:
    """The answer with one number word replaced by another one, as a careless annotator would."""
    places = [index for index, word in enumerate(words) if word in WORDS]
    index = int(rng.choice(places))
    wrong = WORDS[(WORDS.index(words[index]) + int(rng.integers(1, num_choices))) % num_choices]
    return [*words[:index], wrong, *words[index + 1 :]]
