"""Rows of a data set as conversations, in the shapes that people use.

| fields | shape |
|---|---|
| `conversations` | LLaVA: a list of {from, value}; {role, content} is read too |
| `messages` | a list of {role, content}; content is text, or a list of {type: text / image} items |
| `texts` | The Cauldron: a list of {user, assistant} |
| `prompt`, `completion` | TRL: a question and its answer, each a text or a list of messages |
| `question`, `answer` | one question and its answer |
| `refused` | why a row is no conversation, by whoever made the data |
| `chosen`, `rejected` | a preference pair: two answers to the question, the prompt, or the messages before them |

The first of them that a row has counts. Lists may be JSON text, or structs of lists. `image` and `images` hold the
row's images, `system` or `system_prompt` its system turn. A message with `weight: 0` or `loss: false` is no label.
An answer's message may bring `generated_token_ids`, its stop token last: the ids that a teacher generated, which
count in place of its text. What is not read (teacher_dump/data/unread_fields.py) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from teacher_dump.data.message_lists import as_list, text_or_list
from teacher_dump.data.sample import IMAGE_MARKER, Role, SampleRefusedError, Turn, shorten
from teacher_dump.data.unread_fields import (
    Ignored,
    check_markers,
    check_message_fields,
    check_row_fields,
    is_ignored_item,
)

NO_LABEL = "no answer is a label: each has weight 0 or loss false"
UNANSWERED = "?"  # in place of an answer that the teacher is to give
GENERATED_IDS = "generated_token_ids"  # of a message: an answer's own ids

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_SHAPES = ("conversations", "messages", "texts", "prompt", "question")
_LISTS = ("conversations", "messages", "texts")
_SYSTEM_FIELDS = ("system", "system_prompt")
_TEXT_ITEMS = ("text", "input_text", "output_text")
_IMAGE_ITEMS = ("image", "image_url", "input_image")


@dataclass(frozen=True)
class Conversation:
    """Turns from a question to an answer, and the row's images as the row has them."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...]  # in the order of their markers
    rejected: Turn | None = None  # of a preference pair: the answer that lost to the last turn


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row is meant as a preference pair."""
    return row.get("chosen") is not None or row.get("rejected") is not None


def parse_conversation(
    row: Mapping[str, Any], *, only_questions: bool = False, ignored: Ignored = frozenset()
) -> Conversation:
    """The conversation of a row. SampleRefusedError: no known shape, one that is broken, or more than is read.

    With `only_questions` every answer is `UNANSWERED`, and the last question needs none.
    """
    parsing = _Parsing(ignored)
    if isinstance(row.get("refused"), str):
        raise SampleRefusedError(encodable(row["refused"], "refused"))
    check_row_fields(row, ignored)
    if row.get("label") is False and row.get("completion") is not None:
        raise SampleRefusedError("label is false: the completion is an answer that is not wanted, and has no pair")
    rejected = None
    if only_questions:
        if is_pair(row):
            raise SampleRefusedError("a preference pair brings its answers; data.responses: teacher has no use for it")
        turns = _unanswered(_single({**row, "answer": row.get("answer") or UNANSWERED}, parsing))
    elif is_pair(row):
        turns, rejected = _pair(row, parsing)
    else:
        turns = _single(row, parsing)
    turns = _with_system(row, turns)
    _check_order(turns)
    _check_labels(turns, rejected)
    said = turns if rejected is None else [*turns, rejected]
    for number, turn in enumerate(said):
        check_markers(turn.text, ignored, f"turn {number}")
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
    return [replace(turn, text=UNANSWERED) if turn.role == "assistant" else turn for turn in turns]


def _with_system(row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """The turns after the system turn that the row's fields give."""
    given = {name: _text(row[name], name) for name in _SYSTEM_FIELDS if row.get(name)}
    if not given:
        return turns
    if len(set(given.values())) > 1:
        raise SampleRefusedError("system and system_prompt differ; leave one of them out")
    name, text = next(iter(given.items()))
    if not turns or turns[0].role != "system":
        return [Turn("system", text), *turns]
    if turns[0].text != text:
        raise SampleRefusedError(f"{name} and the system turn differ; leave one of them out")
    return turns


def _check_labels(turns: Sequence[Turn], rejected: Turn | None) -> None:
    labelled = [turn.is_trained for turn in turns if turn.role == "assistant"]
    if not any(labelled) or (rejected is not None and not (labelled[-1] and rejected.is_trained)):
        raise SampleRefusedError(NO_LABEL)


def _single(row: Mapping[str, Any], parsing: _Parsing) -> list[Turn]:
    shape = next((name for name in _SHAPES if row.get(name) is not None), None)
    if shape is None:
        fields = ", ".join(f"{name!s:.20}" for name in list(row)[:6])
        raise SampleRefusedError(
            "conversations is missing or empty; messages, texts or question and answer would do; "
            f"the row has {fields or 'no field'}"
        )
    if shape in _LISTS and not as_list(row[shape], shape):
        raise SampleRefusedError(f"{shape} is missing or empty")
    turns = _before_answer(row, shape, parsing)
    if shape == "prompt" and row.get("completion") is not None:
        before, answer = _answer(row, "completion", parsing)
        turns = [*turns, *before, answer]
    elif shape == "question":
        turns.append(Turn("assistant", _text(row.get("answer"), "answer")))
    return turns


def _pair(row: Mapping[str, Any], parsing: _Parsing) -> tuple[list[Turn], Turn]:
    """The turns up to the chosen answer, and the rejected one."""
    shape = next((name for name in _SHAPES if row.get(name) is not None), None)
    told = _Parsing(parsing.ignored)
    before = [] if shape is None else _before_answer(row, shape, told)
    halves = [
        _answer(row, name, parsing if name == "chosen" else _Parsing(parsing.ignored))
        for name in ("chosen", "rejected")
    ]
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
    if shape == "prompt":
        value = text_or_list(value, shape)
    if shape == "question" or (shape == "prompt" and isinstance(value, str)):
        return [Turn("user", _text(value, shape))]
    value = as_list(value, shape)
    if not isinstance(value, list):
        raise SampleRefusedError(f"{shape} is {shorten(value)}, expected a list")
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
    value = text_or_list(row.get(name), name)
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

    def __init__(self, ignored: Ignored) -> None:
        self.ignored = ignored
        self.images: list[Any] = []

    def turn(self, number: int, message: Any) -> Turn:
        if not isinstance(message, dict):
            raise SampleRefusedError(f"turn {number} is {type(message).__name__}, expected an object")
        given = message.get("from") if message.get("from") is not None else message.get("role")
        role = _ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise SampleRefusedError(f"turn {number} is from {shorten(given)}, expected human, gpt or system")
        place = f"turn {number}"
        check_message_fields(message, self.ignored, place)
        content = message.get("value") if message.get("value") is not None else message.get("content")
        ids = _generated_ids(message, number, role)
        if isinstance(content, list):
            content = "".join(self._item(place, item) for item in content)
        is_trained = role != "assistant" or _is_trained(message, place)
        return Turn(role, _text(content, place), is_trained, ids)

    def _item(self, place: str, item: Any) -> str:
        if isinstance(item, str):
            return _text(item, place)
        kind = item.get("type") if isinstance(item, dict) else None
        if is_ignored_item(kind, self.ignored, place):
            return ""
        if kind in _TEXT_ITEMS:
            return _text(item.get("text"), place)
        if kind not in _IMAGE_ITEMS:
            raise SampleRefusedError(f"{place} has an item of type {shorten(kind)}, expected text or image")
        value = next((item[name] for name in ("image", "path", "url", "image_url") if item.get(name) is not None), None)
        if isinstance(value, dict) and isinstance(value.get("url"), str):  # OpenAI's
            value = value["url"]
        if value is not None:
            self.images.append(value)
        elif kind != "image":
            raise SampleRefusedError(f"{place} has an item of type {kind!r} without an address")
        return IMAGE_MARKER


def _is_trained(message: Mapping[str, Any], place: str) -> bool:
    """Whether an answer's tokens are labels."""
    given = {name: message[name] for name in ("weight", "loss") if message.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise SampleRefusedError(f"{place} has the {name} {shorten(value)}, expected 0 or 1 (false or true)")
    return all(given.values())


def _generated_ids(message: Mapping[str, Any], number: int, role: Role) -> tuple[int, ...] | None:
    ids = message.get(GENERATED_IDS)
    if ids is None:
        return None
    is_list = isinstance(ids, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
    if not is_list or role != "assistant":
        raise SampleRefusedError(
            f"turn {number} has {GENERATED_IDS} {shorten(ids)}, expected a list of token ids of an answer"
        )
    return tuple(ids)


def _shown(row: Mapping[str, Any], in_items: list[Any]) -> tuple[Any, ...]:
    """The images that a row's fields or its messages name."""
    named = [_image_list(row[name], name) for name in ("image", "images") if row.get(name) is not None]
    values = [value for name in named for value in (name if isinstance(name, list) else [name])]
    if values and in_items:
        raise SampleRefusedError("images stand both in the row and in its messages; leave one of them out")
    if len(named) == 2 and named[0] != named[1]:
        raise SampleRefusedError("the row has both image and images; leave one of them out")
    return tuple(in_items or (values if len(named) < 2 else values[: len(values) // 2]))


def _image_list(value: Any, name: str) -> Any:
    """A list of images also where it is JSON text, or a struct of lists."""
    is_text = isinstance(value, str) and not (value.startswith("[") and value.endswith("]"))
    found = value if is_text else as_list(value, name)
    return found if isinstance(found, list) else value


def _check_order(turns: list[Turn]) -> None:
    roles = [turn.role for turn in turns if turn.role != "system"]
    if "system" in [turn.role for turn in turns[1:]]:
        raise SampleRefusedError("a system turn must come first")
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise SampleRefusedError("turns must alternate between human and gpt, from a question to an answer")


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise SampleRefusedError(f"{place} is {shorten(value)}, expected text")
    return encodable(value, place)
