"""Parses lists of messages: a list, its JSON text, or a struct of equally long lists."""

from __future__ import annotations

import json
from typing import Any

from teacher_dump.data.sample import SampleRefusedError


def parse_list(value: Any, name: str) -> Any:
    """Returns the list that a field holds; any other value unchanged.

    Raises SampleRefusedError for columns of different lengths.
    """
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, dict) and value and all(isinstance(column, list | None) for column in value.values()):
        columns = {key: column for key, column in value.items() if column is not None}
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{key!s:.20} {length}" for key, length in list(lengths.items())[:4])
            raise SampleRefusedError(f"{name} has lists of different lengths: {shown}")
        if columns:
            return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return value


def parse_text_or_list(value: Any, name: str) -> Any:
    """Parses a field that may be plain text: JSON text is parsed only if it is a list of messages."""
    found = parse_list(value, name)
    if not isinstance(value, str):
        return found
    is_messages = isinstance(found, list) and found and all(_is_message(item) for item in found)
    return found if is_messages else value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _of_text(value: str) -> Any:
    """Parses JSON text of a list or struct; returns any other text unchanged."""
    if not value.lstrip().startswith(("[", "{")):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parse_list(parsed, "JSON text") if isinstance(parsed, list | dict) else value
