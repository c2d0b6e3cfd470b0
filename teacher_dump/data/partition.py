"""The plan: a deterministic split of the samples into parts, the units of work, retry and commit."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from storage.records.records import SampleError
from storage.records.sample_key import SampleKey
from teacher_dump.config import TooLong
from teacher_dump.data.sample import Sample
from teacher_dump.data.sample_spool import SampleSubset


@dataclass(frozen=True)
class Part:
    """Samples that are scored and committed together. No image is in two parts."""

    number: int
    samples: Sequence[Sample]  # may be read from disk on each access
    errors: tuple[SampleError, ...] = ()  # rows that never became a sample; all of them in part 0

    def to_text(self) -> str:
        """Returns the part as JSON text, for another process."""
        errors = [[error.sample_id, error.reason] for error in self.errors]
        return json.dumps([self.number, [sample.as_json() for sample in self.samples], errors])

    @staticmethod
    def from_text(text: str) -> Part:
        """Inverts `to_text`."""
        number, samples, errors = json.loads(text)
        return Part(
            number,
            tuple(Sample.from_json(row) for row in samples),
            tuple(SampleError(*error) for error in errors),
        )


@dataclass(frozen=True)
class Plan:
    """All parts, and the fingerprint of everything that decides what is in them."""

    parts: tuple[Part, ...]
    fingerprint: str

    @property
    def num_samples(self) -> int:
        return sum(len(part.samples) for part in self.parts)


def make_plan(
    samples: Sequence[Sample],
    *,
    errors: Sequence[SampleError] = (),
    samples_per_part: int,
    max_length: int,
    too_long: TooLong = "refuse",
    parts_of_ids: Sequence[Sequence[str]] | None = None,
) -> Plan:
    """Splits the samples into parts of about `samples_per_part`, in the samples' order.

    Samples that share an image, directly or through others, form a group that is never split, as do the
    halves of a preference pair; a part is larger if one group is. `max_length` (tokens) and `too_long` decide
    which samples are refused or cut and are part of the fingerprint. `errors` go to part 0; with no samples
    there is one part.

    `parts_of_ids` are the sample ids of an earlier split, in order, to keep; ids without a sample are left out, so
    parts may be smaller, or empty. Raises ValueError for a sample that it lacks.
    """
    parts: list[array[int]] = []  # places of samples
    if parts_of_ids is not None:
        places = {sample.id: place for place, sample in enumerate(samples)}
        parts = [array("q", [places.pop(name) for name in ids if name in places]) for ids in parts_of_ids]
        if places:
            raise ValueError(f"sample {next(iter(places))} is in none of the {len(parts)} parts to keep")
    for group in [] if parts_of_ids is not None else group_by_images(samples):
        if not parts or len(parts[-1]) + len(group) > samples_per_part:
            parts.append(array("q"))
        parts[-1].extend(group)
    numbered = tuple(
        Part(number, SampleSubset(samples, places) if places else (), tuple(errors) if number == 0 else ())
        for number, places in enumerate(parts or [array("q")])
    )
    return Plan(numbered, _hash_parts(numbered, max_length, too_long))


def group_by_images(samples: Sequence[Sample]) -> Iterator[list[int]]:
    """Yields positions of samples connected by images, groups and members in order of first appearance."""
    parent = array("q", range(len(samples)))
    first_with: dict[str | SampleKey, int] = {}
    for index, sample in enumerate(samples):
        for shared in (*sample.images, *([sample.key.whole] if sample.key.half else [])):
            one, other = first_with.setdefault(shared, index), index
            while parent[one] != one:
                parent[one] = one = parent[parent[one]]
            while parent[other] != other:
                parent[other] = other = parent[parent[other]]
            if one != other:
                parent[max(one, other)] = min(one, other)
    del first_with
    for index in range(len(parent)):  # a parent comes before its children
        parent[index] = parent[parent[index]]
    first = np.frombuffer(parent, np.int64)
    order = np.argsort(first, kind="stable")
    borders = [*np.flatnonzero(np.diff(first[order], prepend=-1)).tolist(), len(order)]
    for start, stop in pairwise(borders):
        yield order[start:stop].tolist()


def _hash_parts(parts: Sequence[Part], max_length: int, too_long: TooLong) -> str:
    rule = "" if too_long == "refuse" else f"{too_long}\0"
    digest = hashlib.sha256(f"stillhouse plan 1\0{max_length}\0{rule}".encode())
    for part in parts:
        errors = [error.sample_id for error in part.errors]  # a reason may name folders of this machine
        row = [part.number, [sample.as_json() for sample in part.samples], errors]
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()
