"""Concepts of the emoji experiment: what an emoji shows, its kind and group, and the split by first code point.

Read from npm's emojibase-data (names, kinds, groups, in many languages) and from the two packages of pictures.
An emoji and its variants (gender, hair, role) form a family, and a family is on one side of the split. They share
their first code point, or one of those in `_PERSONS`. A variant of another kind than its family's first emoji is left
out, so a family has one kind.
Flags and components are left out, as are kinds of fewer than MIN_FAMILIES families, which could not be asked about on
all sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from examples.emoji.packages import Tarball

Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")
HELD_OUT_FRACTIONS: Mapping[Side, float] = {"validation": 0.1, "test": 0.2}  # of the families of each kind
LEFT_OUT_GROUPS = ("component", "flags")
MAX_VARIANTS = 3  # of a family, the first ones in Unicode's order: a person has forty roles
MIN_FAMILIES = 8  # of a kind

# man, woman; old man, old woman; man dancing: the same drawings as person, old person, woman dancing with other hair
_PERSONS = {"1F468": "1F9D1", "1F469": "1F9D1", "1F474": "1F9D3", "1F475": "1F9D3", "1F57A": "1F483"}


@dataclass(frozen=True)
class Concept:
    """What an emoji shows. `kind` and `group` are Unicode's, in words; `translated` is the kind in Spanish."""

    hexcode: str
    name: str
    kind: str
    group: str
    translated: str

    @property
    def family(self) -> str:
        """The first code point, which variants of an emoji share; of people that of any age's and gender's person."""
        first = self.hexcode.partition("-")[0]
        return _PERSONS.get(first, first)


def read_concepts(names: Tarball, drawn: Collection[str]) -> list[Concept]:
    """The selected concepts among those that are drawn, in Unicode's order. `drawn`: normalised code points."""
    messages, translations = (_read_messages(names, language) for language in ("en", "es"))
    keys = names.read_json("meta/groups.json")
    found = []
    for record in sorted(names.read_json("en/data.json"), key=lambda record: record.get("order", 0)):
        if "subgroup" not in record or normalise_hexcode(record["hexcode"]) not in drawn:
            continue
        group, kind = keys["groups"][str(record["group"])], keys["subgroups"][str(record["subgroup"])]
        if group not in LEFT_OUT_GROUPS:
            found.append(
                Concept(
                    hexcode=normalise_hexcode(record["hexcode"]),
                    name=record["label"],
                    kind=messages["subgroups"][kind],
                    group=messages["groups"][group],
                    translated=translations["subgroups"][kind],
                )
            )
    return select_concepts(found)


def select_concepts(concepts: Iterable[Concept]) -> list[Concept]:
    """The first MAX_VARIANTS concepts of one kind of each family, of the kinds that have enough families."""
    families: dict[str, list[Concept]] = {}
    for concept in concepts:
        variants = families.setdefault(concept.family, [])
        if len(variants) < MAX_VARIANTS and concept.kind == (variants or [concept])[0].kind:
            variants.append(concept)
    num_families = Counter(variants[0].kind for variants in families.values())
    return [
        concept
        for variants in families.values()
        if num_families[variants[0].kind] >= MIN_FAMILIES
        for concept in variants
    ]


def split_by_family(concepts: Sequence[Concept], *, seed: int) -> dict[str, Side]:
    """The side of each family, by its first code point; every kind has families on every side."""
    families: dict[str, list[str]] = {}
    for concept in concepts:
        of_kind = families.setdefault(concept.kind, [])
        if concept.family not in of_kind:
            of_kind.append(concept.family)
    rng = np.random.default_rng(seed)
    sides: dict[str, Side] = {}
    for kind in sorted(families):
        shuffled = [families[kind][int(index)] for index in rng.permutation(len(families[kind]))]
        start = 0
        for side, fraction in HELD_OUT_FRACTIONS.items():
            stop = start + max(1, round(fraction * len(shuffled)))
            sides.update((family, side) for family in shuffled[start:stop])
            start = stop
        sides.update((family, "train") for family in shuffled[start:])
    return sides


def read_pictures(pictures: Tarball, style: str) -> dict[str, bytes]:
    """The small PNGs of one style by their normalised code points."""
    folder = f"img/{style}/64/"
    return {
        normalise_hexcode(PurePosixPath(name).stem): pictures.read(name)
        for name in pictures.names
        if name.startswith(folder)
    }


def normalise_hexcode(hexcode: str) -> str:
    """Code points in capitals without the variation selector FE0F, which only some of the packages write."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def _read_messages(names: Tarball, language: str) -> dict[str, dict[str, Any]]:
    messages = names.read_json(f"{language}/messages.json")
    return {part: {each["key"]: each["message"] for each in messages[part]} for part in ("groups", "subgroups")}
