"""The questions of the emoji experiment, as lines of LLaVA-format JSONL. `category` is the task.

A picture is one drawing of one concept. Every concept of the side `train` is seen in training, but a share of them in
one style alone; their drawing in the other style is held out, and asked for its name. All other held-out questions are
about concepts of which training sees no drawing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from examples.emoji.concepts import Concept, Side
from examples.emoji.packages import STYLES

Task = Literal["kind", "name", "group", "yes_no", "kind_spanish"]
TASKS: tuple[Task, ...] = ("kind", "name", "group", "yes_no", "kind_spanish")
ONE_STYLE_FRACTION = 0.25  # of the concepts of `train`, those that are seen in one style alone
VALIDATION_FRACTION = 1 / 3  # of the drawings of such concepts in the other style; the rest are for the test


@dataclass(frozen=True)
class Picture:
    """One drawing of one concept."""

    concept: Concept
    style: str

    @property
    def path(self) -> str:
        """Where the picture lies, seen from the JSONL files."""
        return f"images/{self.style}/{self.concept.hexcode}.png"


@dataclass(frozen=True)
class Question:
    """One question about one picture. `about` is the kind that a yes/no question names."""

    picture: Picture
    task: Task
    about: str = ""

    @property
    def text(self) -> str:
        """The question's words. But for the kind that is named, they depend on the task alone."""
        return {
            "kind": "What kind of thing is this?",
            "name": "What is this called?",
            "group": "Which group does this belong to?",
            "yes_no": f"Does this belong to the kind {self.about}?",
            "kind_spanish": "¿De qué tipo es esto?",
        }[self.task]

    @property
    def answer(self) -> str:
        """The one right answer."""
        concept = self.picture.concept
        return {
            "kind": concept.kind,
            "name": concept.name,
            "group": concept.group,
            "yes_no": "yes" if self.about == concept.kind else "no",
            "kind_spanish": concept.translated,
        }[self.task]

    def to_line(self) -> str:
        """The question as a line of JSONL."""
        concept = self.picture.concept
        suffix = f"-{self.answer}" if self.task == "yes_no" else ""
        record = {
            "id": f"{self.task}{suffix}-{concept.hexcode}-{self.picture.style}",
            "image": self.picture.path,
            "category": self.task,
            "conversations": [
                {"from": "human", "value": f"<image>\n{self.text}"},
                {"from": "gpt", "value": self.answer},
            ],
        }
        return json.dumps(record, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class PictureSplit:
    """Pictures of each purpose; none is in two of the fields."""

    seen: list[Picture]  # in training
    one_style: list[Picture]  # in training too, of concepts that are seen in this style alone
    other_style: dict[Side, list[Picture]]  # the held-out drawings of those concepts
    unseen: dict[Side, list[Picture]]  # all drawings of concepts that training does not see

    @property
    def pictures(self) -> list[Picture]:
        """All of them."""
        held_out = [picture for part in (self.other_style, self.unseen) for side in part.values() for picture in side]
        return [*self.seen, *self.one_style, *held_out]


def split_pictures(concepts: Sequence[Concept], sides: Mapping[str, Side], *, seed: int) -> PictureSplit:
    """Decides for each picture what it is for. `sides`: of each family."""
    rng = np.random.default_rng([seed, 1])
    split = PictureSplit([], [], {"validation": [], "test": []}, {"validation": [], "test": []})
    styles = list(STYLES)
    for concept in concepts:
        side = sides[concept.family]
        chance, flip, held_out_for = rng.random(3)
        drawings = [Picture(concept, style) for style in (styles if flip < 0.5 else styles[::-1])]
        if side != "train":
            split.unseen[side] += drawings
        elif chance >= ONE_STYLE_FRACTION:
            split.seen.extend(drawings)
        else:
            split.one_style.append(drawings[0])
            split.other_style["validation" if held_out_for < VALIDATION_FRACTION else "test"].append(drawings[1])
    return split


def ask_in_training(split: PictureSplit, *, seed: int) -> list[Question]:
    """Every task about every picture of training, both answers of yes_no, in an order drawn by `seed`."""
    rng = np.random.default_rng([seed, 2])
    pictures = [*split.seen, *split.one_style]
    kinds = [picture.concept.kind for picture in pictures]
    asked = [question for task in TASKS for question in _ask_task(pictures, task, kinds, rng, both=True)]
    return [asked[int(index)] for index in rng.permutation(len(asked))]


def select_for_students(asked: Sequence[Question], split: PictureSplit, *, num: int) -> list[Question]:
    """The first `num` of training's questions, and besides them those that the held-out names depend on."""
    one_style = set(split.one_style)
    return [
        question
        for index, question in enumerate(asked)
        if index < num or (question.task == "name" and question.picture in one_style)
    ]


def ask_held_out(split: PictureSplit, side: Side, *, num_per_task: int, seed: int) -> list[Question]:
    """`num_per_task` questions of each task, or as many as there are pictures. Names are of seen concepts."""
    rng = np.random.default_rng([seed, 3, len(side)])
    kinds = [picture.concept.kind for picture in split.unseen[side]]
    asked = []
    for task in TASKS:
        pictures = split.other_style[side] if task == "name" else split.unseen[side]
        chosen = [pictures[int(index)] for index in rng.permutation(len(pictures))[:num_per_task]]
        asked += _ask_task(chosen, task, kinds, rng, both=False)
    return asked


def _ask_task(
    pictures: Sequence[Picture], task: Task, kinds: Sequence[str], rng: np.random.Generator, *, both: bool
) -> list[Question]:
    """One question about each picture; of yes_no two if `both`, else yes and no by turns.

    Answers no are about a kind drawn from `kinds`, those of all pictures, so that a kind is named in them about as
    often as in answers yes.
    """
    if task != "yes_no":
        return [Question(picture, task) for picture in pictures]
    asked = []
    for index, picture in enumerate(pictures):
        right = picture.concept.kind
        others = [kind for kind in kinds if kind != right]
        wrong = others[int(rng.integers(len(others)))]
        named = (right, wrong) if both else ((right, wrong)[index % 2],)
        asked += [Question(picture, task, about) for about in named]
    return asked
