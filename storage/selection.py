"""Methods that select the stored entries of a teacher's distribution: what each one means, without its computation.

A new method is a class here, its field in `SelectionSection` (storage/config.py), and its
computation in teacher_dump/signals/sparsify.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

MethodName = Literal["threshold", "topk", "mass", "sampled"]


@dataclass(frozen=True)
class Selection:
    """A method with its parameters; the fields of a class are those of the YAML section that it reads."""

    name: ClassVar[MethodName]  # in YAML
    keeps_exact: ClassVar[bool] = True  # whether a row has exact entries

    @property
    def draw_weight(self) -> float:
        """The weight of one sampled draw; 0 if the method draws nothing."""
        return 0.0

    @property
    def samples_tail(self) -> bool:
        """Whether rows have sampled entries, whose expected weights are the tail's probabilities."""
        return self.draw_weight > 0


@dataclass(frozen=True)
class TopK(Selection):
    """The k most probable tokens of each row, exactly."""

    name = "topk"
    k: int


@dataclass(frozen=True)
class Threshold(Selection):
    """Every token with p >= tau exactly; any other is drawn with probability p / tau and gets weight tau."""

    name = "threshold"
    tau: float

    @property
    def draw_weight(self) -> float:
        return self.tau


@dataclass(frozen=True)
class Mass(Selection):
    """The smallest set of most probable tokens whose mass is at least `mass`, exactly."""

    name = "mass"
    mass: float


@dataclass(frozen=True)
class Sampled(Selection):
    """`draws` independent draws from the row, each of weight 1 / draws; no exact entries.

    Source: random-sampling knowledge distillation (arXiv 2503.16870), at proposal temperature 1.
    """

    name = "sampled"
    keeps_exact = False
    draws: int

    @property
    def draw_weight(self) -> float:
        return 1 / self.draws


METHODS: Mapping[str, type[Selection]] = {each.name: each for each in (Threshold, TopK, Mass, Sampled)}


def find_parameters(method: type[Selection]) -> set[str]:
    """Returns the names of the fields that a method reads."""
    return {each.name for each in fields(method)}


def make_selection(settings: Mapping[str, Any]) -> Selection:
    """Makes the method that a section's fields, or a family's entry of `Identity.selection`, describe.

    ValueError for a method that does not exist, or that lacks a parameter: a number above 0.
    """
    name = settings["method"]
    method = METHODS.get(name) if isinstance(name, str) else None
    values = {} if method is None else {each: settings.get(each) for each in find_parameters(method)}
    if method is None or not all(isinstance(value, int | float) and value > 0 for value in values.values()):
        expected = "; ".join(f"{name}: {', '.join(find_parameters(each))}" for name, each in METHODS.items())
        raise ValueError(f"selection {dict(settings)} is none of the methods with their parameters ({expected})")
    return method(**values)
