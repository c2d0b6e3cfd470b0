"""Unsupported fields, items and markers of rows: refused by name, unless their source ignores them.

| name in `ignore` | where it stands |
|---|---|
| `video`, `audio` | a row's field of that name (or its plural), an item of that type |
| `tools` | a row's `tools` or `functions`, a message's `tool_calls` or `function_call` |
| `reasoning_content` | a message's `reasoning_content`, `reasoning` or `thinking`, an item of the type `thinking` |
| `<video>`, `<audio>`, `<img>`, `<image 1>`, `<ImageHere>` | a marker in a text; ignored, it stays text |
| `media` | a member of a tar that is neither JSON nor an image |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from teacher_dump.config import Ignorable
from teacher_dump.data.sample import SampleRefusedError

Ignored = frozenset[Ignorable]
IGNORABLE: tuple[Ignorable, ...] = get_args(Ignorable)

_ROW_FIELDS: Mapping[str, Ignorable] = {
    "video": "video",
    "videos": "video",
    "audio": "audio",
    "audios": "audio",
    "tools": "tools",
    "functions": "tools",
    "reasoning_content": "reasoning_content",
}
_MESSAGE_FIELDS: Mapping[str, Ignorable] = {
    **_ROW_FIELDS,
    "tool_calls": "tools",
    "function_call": "tools",
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
}
_ITEM_TYPES: Mapping[str, Ignorable] = {
    "video": "video",
    "video_url": "video",
    "input_video": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "thinking": "reasoning_content",
    "reasoning": "reasoning_content",
}
_MARKERS: Mapping[Ignorable, re.Pattern[str]] = {
    "<video>": re.compile(r"<video>"),
    "<audio>": re.compile(r"<audio>"),
    "<img>": re.compile(r"<img>.*?</img>", re.IGNORECASE | re.DOTALL),
    "<image 1>": re.compile(r"<image[ _]?[0-9]+>"),
    "<ImageHere>": re.compile(r"<ImageHere>"),
}


def check_row_fields(row: Mapping[str, Any], ignored: Ignored) -> None:
    """Raises SampleRefusedError if the row has an unsupported field."""
    _check_fields(row, _ROW_FIELDS, ignored, "the row")


def check_message_fields(message: Mapping[str, Any], ignored: Ignored, place: str) -> None:
    """Raises SampleRefusedError if a message has an unsupported field."""
    _check_fields(message, _MESSAGE_FIELDS, ignored, place)
    for name in ("image", "images"):
        if _is_given(message.get(name)):
            raise SampleRefusedError(f"{place} has {name} of its own; they belong to the row or to its items")


def is_ignored_item(kind: Any, ignored: Ignored, place: str) -> bool:
    """Returns whether an item of this type is left out. Raises SampleRefusedError if it is unsupported."""
    name = _ITEM_TYPES.get(kind) if isinstance(kind, str) else None
    if name is not None and name not in ignored:
        raise SampleRefusedError(f"{place} has an item of type {kind!r}, which is not read{_opt_out(name)}")
    return name is not None


def check_markers(text: str, ignored: Ignored, place: str) -> None:
    """Raises SampleRefusedError if a text has a marker of other media, or another tool's image marker."""
    for name, pattern in _MARKERS.items():
        if name not in ignored and pattern.search(text):
            raise SampleRefusedError(
                f"{place} has the marker {name}, which is not read (an image's place is <image>){_opt_out(name)}"
            )


def _check_fields(row: Mapping[str, Any], names: Mapping[str, Ignorable], ignored: Ignored, place: str) -> None:
    for field, name in names.items():
        if name not in ignored and _is_given(row.get(field)):
            raise SampleRefusedError(f"{place} has {field}, which is not read{_opt_out(name)}")


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, str | bytes | list | dict) and not value)


def _opt_out(name: Ignorable) -> str:
    shown = f'"{name}"' if name.startswith("<") else name
    return f"; `ignore: [{shown}]` of its source reads the sample without it"
