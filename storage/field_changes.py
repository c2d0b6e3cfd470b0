"""Describes the fields in which a JSON document differs from an older one, for messages."""

from __future__ import annotations

import json
from typing import Any

_HASH_LENGTH = 64
_SHOWN_HASH = 12
_SHOWN_LENGTH = 80


def describe_changes(old: Any, new: Any, name: str = "") -> list[str]:
    """Returns one line per leaf in which two documents differ: its dotted name and both values."""
    return _list_changes(_to_json(old), _to_json(new), name)


def _list_changes(old: Any, new: Any, name: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        pairs = [(key, old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and _holds_documents([*old, *new]):
        pairs = [(str(number), was, new[number]) for number, was in enumerate(old)]
    else:
        return [] if old == new else [f"{name}: was {_shorten(old)}, is {_shorten(new)}"]
    return [line for key, was, now in pairs for line in _list_changes(was, now, f"{name}.{key}" if name else key)]


def _holds_documents(items: list[Any]) -> bool:
    return all(isinstance(item, dict) for item in items)


def _to_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _shorten(value: Any) -> str:
    if isinstance(value, str) and len(value) == _HASH_LENGTH and set(value) <= set("0123456789abcdef"):
        return f"{value[:_SHOWN_HASH]}…"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}…"
