"""Rows of a data set as conversations, in the shapes that people use.

| fields | shape |
|---|---|
| `conversations` | LLaVA: a list of {from, value}; {role, content} is read too |
| `messages` | a list of {role, content}; content is text, or a list of {type: text / image} items |
| `texts` | The Cauldron: a list of {user, assistant} |
| `question`, `answer` | one question and its answer |
| `refused` | why a row is no conversation, by whoever made the data |
| `chosen`, `rejected` | a preference pair: two answers to the question, the prompt, or the messages before them |

The first of them that a row has counts. `image` and `images` hold the row's images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teacher_dump.prompt import IMAGE_MARKER
from teacher_dump.samples import Role, SampleRefusedError, Turn

UNANSWERED = "?"  # in place of an answer that the teacher is to give

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_SHAPES = ("conversations", "messages", "texts", "prompt", "question")


@dataclass(frozen=True)
class Conversation:
    """Turns from a question to an answer, and the row's images as the row has them."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...]  # in the order of their markers
    rejected: Turn | None = None  # of a preference pair: the answer that lost to the last turn


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row is meant as a preference pair."""
    return row.get("chosen") is not None or row.get("rejected") is not None


def parse_conversation(row: Mapping[str, Any], *, only_questions: bool = False) -> Conversation:
    """The conversation of a row. SampleRefusedError: no known shape, or one that is broken.

    With `only_questions` every answer is `UNANSWERED`, and the last question needs none.
    """
    parsing = _Parsing()
    if isinstance(row.get("refused"), str):
        raise SampleRefusedError(encodable(row["refused"], "refused"))
    if only_questions:
        if is_pair(row):
            raise SampleRefusedError("a preference pair brings its answers; data.responses: teacher has no use for it")
        turns = _unanswered(_single({**row, "answer": row.get("answer") or UNANSWERED}, parsing))
        _check_order(turns)
        return Conversation(tuple(turns), _shown(row, parsing.images))
    if is_pair(row):
        turns, rejected = _pair(row, parsing)
    else:
        turns, rejected = _single(row, parsing), None
    _check_order(turns)
    return Conversation(tuple(turns), _shown(row, parsing.images), rejected)


def encodable(text: str, place: str) -> str:
    """The text itself; JSON can spell half a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleRefusedError(f"{place} is no valid Unicode: {error}") from error
    return text


def _unanswered(turns: list[Turn]) -> list[Turn]:
    if turns and turns[-1].role == "user":
        turns = [*turns, Turn("assistant", UNANSWERED)]
    return [Turn("assistant", UNANSWERED) if turn.role == "assistant" else turn for turn in turns]


def _single(row: Mapping[str, Any], parsing: _Parsing) -> list[Turn]:
    shape = next((name for name in _SHAPES if row.get(name) is not None), None)
    if shape is None:
        raise SampleRefusedError("conversations is missing or empty; messages, texts or question and answer would do")
    if shape not in ("question", "prompt") and not (isinstance(row[shape], list) and row[shape]):
        raise SampleRefusedError(f"{shape} is missing or empty")
    turns = _before_answer(row, shape, parsing)
    if shape == "question":
        turns.append(Turn("assistant", _text(row.get("answer"), "answer")))
    return turns


def _pair(row: Mapping[str, Any], parsing: _Parsing) -> tuple[list[Turn], Turn]:
    """The turns up to the chosen answer, and the rejected one."""
    shape = next((name for name in _SHAPES if row.get(name) is not None), None)
    told = _Parsing()
    before = [] if shape is None else _before_answer(row, shape, told)
    halves = [_answer(row, name, parsing if name == "chosen" else _Parsing()) for name in ("chosen", "rejected")]
    (chosen_before, chosen), (rejected_before, rejected) = halves
    if chosen_before != rejected_before:
        raise SampleRefusedError("chosen and rejected are answers to different prompts")
    if chosen_before and _opening(before) == _opening(chosen_before):  # told twice, as UltraFeedback does
        is_same = chosen_before[: len(before)] == before or before in (
            [*chosen_before, one] for one in (chosen, rejected)
        )
        if not is_same:
            raise SampleRefusedError(f"{shape} and chosen begin alike and go on otherwise; leave {shape} out")
        parsing.images = parsing.images or told.images
        return [*chosen_before, chosen], rejected
    parsing.images[:0] = told.images
    return [*before, *chosen_before, chosen], rejected


def _opening(turns: Sequence[Turn]) -> str | None:
    """The first question's text."""
    return next((turn.text.replace(IMAGE_MARKER, "").strip() for turn in turns if turn.role == "user"), None)


def _before_answer(row: Mapping[str, Any], shape: str, parsing: _Parsing) -> list[Turn]:
    value = row[shape]
    if shape == "question" or isinstance(value, str):
        return [Turn("user", _text(value, shape))]
    if not isinstance(value, list):
        raise SampleRefusedError(f"{shape} is {type(value).__name__}, expected a list")
    if shape == "texts":
        return [turn for number, one in enumerate(value) for turn in _exchange(number, one)]
    return [parsing.turn(number, message) for number, message in enumerate(value)]


def _exchange(number: int, one: Any) -> list[Turn]:
    if not isinstance(one, dict):
        raise SampleRefusedError(f"texts[{number}] is {type(one).__name__}, expected an object")
    return [
        Turn("user", _text(one.get("user"), f"texts[{number}].user")),
        Turn("assistant", _text(one.get("assistant"), f"texts[{number}].assistant")),
    ]


def _answer(row: Mapping[str, Any], name: str, parsing: _Parsing) -> tuple[list[Turn], Turn]:
    """The messages that a half brings before its answer, and the answer."""
    value = row.get(name)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return [], Turn("assistant", _text(value, name))
    turns = [parsing.turn(number, message) for number, message in enumerate(value)]
    if not turns or turns[-1].role != "assistant":
        raise SampleRefusedError(f"{name} does not end with an answer")
    return turns[:-1], turns[-1]


class _Parsing:
    """Messages become turns; images that stand in their items are gathered."""

    def __init__(self) -> None:
        self.images: list[Any] = []

    def turn(self, number: int, message: Any) -> Turn:
        if not isinstance(message, dict):
            raise SampleRefusedError(f"turn {number} is {type(message).__name__}, expected an object")
        given = message.get("from") if message.get("from") is not None else message.get("role")
        role = _ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise SampleRefusedError(f"turn {number} is from {_short(given)}, expected human, gpt or system")
        content = message.get("value") if message.get("value") is not None else message.get("content")
        if isinstance(content, list):
            return Turn(role, "".join(self._item(number, item) for item in content))
        if not isinstance(content, str):
            raise SampleRefusedError(f"turn {number} has the value {_short(content)}, expected text")
        return Turn(role, encodable(content, f"turn {number}"))

    def _item(self, number: int, item: Any) -> str:
        if isinstance(item, str):
            return encodable(item, f"turn {number}")
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text":
            return _text(item.get("text"), f"turn {number}")
        if kind != "image":
            raise SampleRefusedError(f"turn {number} has an item of type {_short(kind)}, expected text or image")
        value = next((item[name] for name in ("image", "path", "url") if item.get(name) is not None), None)
        if value is not None:
            self.images.append(value)
        return IMAGE_MARKER


def _shown(row: Mapping[str, Any], in_items: list[Any]) -> tuple[Any, ...]:
    """The images that a row's fields or its messages name."""
    named = [row[name] for name in ("image", "images") if row.get(name) is not None]
    values = [value for name in named for value in (name if isinstance(name, list) else [name])]
    if values and in_items:
        raise SampleRefusedError("images stand both in the row and in its messages; leave one of them out")
    if len(named) == 2 and named[0] != named[1]:
        raise SampleRefusedError("the row has both image and images; leave one of them out")
    return tuple(in_items or (values if len(named) < 2 else values[: len(values) // 2]))


def _check_order(turns: list[Turn]) -> None:
    roles = [turn.role for turn in turns if turn.role != "system"]
    if "system" in [turn.role for turn in turns[1:]]:
        raise SampleRefusedError("a system turn must come first")
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise SampleRefusedError("turns must alternate between human and gpt, from a question to an answer")


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise SampleRefusedError(f"{place} is {_short(value)}, expected text")
    return encodable(value, place)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
