"""Wrong values in every field of every section: a message names the field as the user wrote it, and no validator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from types import ModuleType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

import stillhouse.config
import storage.config
import student_train.config
import teacher_dump.config
from storage.config import Section
from storage.config_loader import _describe_problem, _expand_unions

MODULES = (storage.config, teacher_dump.config, student_train.config, stillhouse.config)
WRONG: list[Any] = [
    None, True, -1, -99999, 1.5, "", "nonsense", [], [[]], {}, {"zzz": 1}, [1, "x", {}],
    {"a": {"zzz": [1]}}, ["zzz", {"zzz": 2}],
]  # fmt: skip
OURS_ALONE = re.compile(r"[\[\]()]|function-|constrained|Section\b")


def models(module: ModuleType) -> Iterator[type[Section]]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Section):
            yield value


def wrong_values(kind: Any, depth: int = 0) -> Iterator[Any]:
    """Values for a field: plain ones, and sections, lists and mappings with one of them inside."""
    yield from WRONG
    if depth > 2:
        return
    for member in _expand_unions(kind):
        if isinstance(member, type) and issubclass(member, BaseModel):
            for name, field in member.model_fields.items():
                yield from ({name: value} for value in wrong_values(field.annotation, depth + 1))
        else:
            for argument in get_args(member):
                for value in islice(wrong_values(argument, depth + 1), 60):
                    yield [value]
                    yield {"k": value}


def problems() -> Iterator[str]:
    for schema in {model for module in MODULES for model in models(module)}:
        for name, field in schema.model_fields.items():
            for value in islice(wrong_values(field.annotation), 4000):
                try:
                    schema.model_validate({name: value})
                except ValidationError as error:
                    yield from (_describe_problem("section", schema, detail) for detail in error.errors())


def test_a_message_names_fields_and_no_validator_of_pydantic() -> None:
    found = list(problems())
    assert len(found) > 5000
    for problem in found:
        place, _, rest = problem.partition(": ")
        assert re.fullmatch(r"section(\.\w+)*", place), problem
        assert not OURS_ALONE.search(place + rest.partition("got")[0]), problem
