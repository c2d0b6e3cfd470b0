"""Which fields of a JSON document differ from an older one, as messages name them."""

from __future__ import annotations

import json
from typing import Any

_HASH_LENGTH = 64
_SHOWN_HASH = 12
_SHOWN_LENGTH = 80


def changed_fields(old: Any, new: Any, name: str = "") -> list[str]:
    """One line for each leaf in which two documents differ: its dotted name and both values."""
    return _changes(_as_json(old), _as_json(new), name)


def _changes(old: Any, new: Any, name: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        pairs = [(key, old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and _holds_documents([*old, *new]):
        pairs = [(str(number), was, new[number]) for number, was in enumerate(old)]
    else:
        return [] if old == new else [f"{name}: was {_shown(old)}, is {_shown(new)}"]
    return [line for key, was, now in pairs for line in _changes(was, now, f"{name}.{key}" if name else key)]


def _holds_documents(items: list[Any]) -> bool:
    return all(isinstance(item, dict) for item in items)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == _HASH_LENGTH and set(value) <= set("0123456789abcdef"):
        return f"{value[:_SHOWN_HASH]}…"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}…"
