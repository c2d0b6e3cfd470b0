"""Parses rows of a data set as conversations, in the shapes that data sets use.

| fields | shape |
|---|---|
| `conversations` | LLaVA: a list of {from, value}; {role, content} is read too |
| `messages` | a list of {role, content}; content is text, or a list of {type: text / image} items |
| `texts` | The Cauldron: a list of {user, assistant} |
| `prompt`, `completion` | TRL: a question and its answer, each a text or a list of messages |
| `question`, `answer` | one question and its answer |
| `refused` | text: why the tool that made the data gave no conversation |
| `chosen`, `rejected` | a preference pair: two answers to the question, the prompt, or the messages before them |

The first shape that a row has is used. Lists may be JSON text, or structs of lists. `image` and `images` hold the
row's images, `system` or `system_prompt` its system turn. A message with `weight: 0` or `loss: false` is no label.
An answer's message may have `generated_token_ids`, the stop token last: ids that a teacher generated, used instead
of its text. Unsupported fields (teacher_dump/data/unread_fields.py) are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from teacher_dump.data.message_lists import parse_list, parse_text_or_list
from teacher_dump.data.sample import IMAGE_MARKER, Role, SampleRefusedError, Turn, shorten
from teacher_dump.data.unread_fields import (
    Ignored,
    check_markers,
    check_message_fields,
    check_row_fields,
    is_ignored_item,
)

NO_LABEL = "no answer is a label: each has weight 0 or loss false"
UNANSWERED = "?"  # placeholder of an answer that the teacher will generate
GENERATED_IDS = "generated_token_ids"  # the field of a message that holds an answer's generated ids
QUESTION_KEY = "question_key"  # the field of a row that the teacher answered: the key of the question

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
    """Turns from a question to an answer, and the row's images, not resolved yet."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...]  # in the order of their markers
    rejected: Turn | None = None  # of a preference pair: the answer that lost to the last turn


def is_pair(row: Mapping[str, Any]) -> bool:
    """Returns whether a row has a field of a preference pair."""
    return row.get("chosen") is not None or row.get("rejected") is not None


def parse_conversation(
    row: Mapping[str, Any], *, only_questions: bool = False, ignored: Ignored = frozenset()
) -> Conversation:
    """Parses a row. Raises SampleRefusedError for an unknown or broken shape, or unsupported fields.

    With `only_questions` every answer is `UNANSWERED`, and the last question needs no answer.
    """
    parser = _MessageParser(ignored)
    if isinstance(row.get("refused"), str):
        raise SampleRefusedError(check_encodable(row["refused"], "refused"))
    check_row_fields(row, ignored)
    if row.get("label") is False and row.get("completion") is not None:
        raise SampleRefusedError("label is false: the completion is a rejected answer without a chosen one")
    rejected = None
    if only_questions:
        if is_pair(row):
            raise SampleRefusedError("is a preference pair, whose answers data.responses cannot generate")
        turns = _replace_answers(_parse_single({**row, "answer": row.get("answer") or UNANSWERED}, parser))
    elif is_pair(row):
        turns, rejected = _parse_pair(row, parser)
    else:
        turns = _parse_single(row, parser)
    turns = _add_system_turn(row, turns)
    _check_order(turns)
    _check_labels(turns, rejected)
    all_turns = turns if rejected is None else [*turns, rejected]
    for number, turn in enumerate(all_turns):
        check_markers(turn.text, ignored, f"turn {number}")
    return Conversation(tuple(turns), _collect_images(row, parser.images), rejected)


def check_encodable(text: str, place: str) -> str:
    """Returns the text if it can be encoded; JSON can hold half a surrogate pair, which UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleRefusedError(f"{place} is not valid Unicode: {error}") from error
    return text


def _replace_answers(turns: list[Turn]) -> list[Turn]:
    if turns and turns[-1].role == "user":
        turns = [*turns, Turn("assistant", UNANSWERED)]
    return [replace(turn, text=UNANSWERED) if turn.role == "assistant" else turn for turn in turns]


def _add_system_turn(row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """Returns the turns, with the system turn of the row's fields first."""
    given = {name: _check_text(row[name], name) for name in _SYSTEM_FIELDS if row.get(name)}
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


def _parse_single(row: Mapping[str, Any], parser: _MessageParser) -> list[Turn]:
    shape = next((name for name in _SHAPES if row.get(name) is not None), None)
    if shape is None:
        fields = ", ".join(f"{name!s:.20}" for name in list(row)[:6])
        raise SampleRefusedError(
            "conversations is missing or empty; messages, texts or question and answer would do; "
            f"the row has {fields or 'no field'}"
        )
    if shape in _LISTS and not parse_list(row[shape], shape):
        raise SampleRefusedError(f"{shape} is missing or empty")
    turns = _parse_context(row, shape, parser)
    if shape == "prompt" and row.get("completion") is not None:
        before, answer = _parse_answer(row, "completion", parser)
        turns = [*turns, *before, answer]
    elif shape == "question":
        turns.append(Turn("assistant", _check_text(row.get("answer"), "answer")))
    return turns


def _parse_pair(row: Mapping[str, Any], parser: _MessageParser) -> tuple[list[Turn], Turn]:
    """Returns the turns up to the chosen answer, and the rejected answer."""
    shape = next((name for name in _SHAPES if row.get(name) is not None), None)
    context_parser = _MessageParser(parser.ignored)
    before = [] if shape is None else _parse_context(row, shape, context_parser)
    answers = [
        _parse_answer(row, name, parser if name == "chosen" else _MessageParser(parser.ignored))
        for name in ("chosen", "rejected")
    ]
    (chosen_before, chosen), (rejected_before, rejected) = answers
    if chosen_before != rejected_before:
        raise SampleRefusedError("chosen and rejected are answers to different prompts")
    # The messages stand twice, in their own field and in chosen, as in UltraFeedback.
    if chosen_before and _get_first_question(before) == _get_first_question(chosen_before):
        is_same = chosen_before[: len(before)] == before or before in (
            [*chosen_before, one] for one in (chosen, rejected)
        )
        if not is_same:
            raise SampleRefusedError(f"{shape} and chosen begin alike but differ later; leave {shape} out")
        parser.images = parser.images or context_parser.images
        return [*chosen_before, chosen], rejected
    parser.images[:0] = context_parser.images
    return [*before, *chosen_before, chosen], rejected


def _get_first_question(turns: Sequence[Turn]) -> str | None:
    """Returns the first question's text, without image markers."""
    return next((turn.text.replace(IMAGE_MARKER, "").strip() for turn in turns if turn.role == "user"), None)


def _parse_context(row: Mapping[str, Any], shape: str, parser: _MessageParser) -> list[Turn]:
    value = row[shape]
    if shape == "prompt":
        value = parse_text_or_list(value, shape)
    if shape == "question" or (shape == "prompt" and isinstance(value, str)):
        return [Turn("user", _check_text(value, shape))]
    value = parse_list(value, shape)
    if not isinstance(value, list):
        raise SampleRefusedError(f"{shape} is {shorten(value)}, expected a list")
    if shape == "texts":
        return [turn for number, one in enumerate(value) for turn in _parse_exchange(number, one)]
    return [parser.parse_turn(number, message) for number, message in enumerate(value)]


def _parse_exchange(number: int, one: Any) -> list[Turn]:
    if not isinstance(one, dict):
        raise SampleRefusedError(f"texts[{number}] is {type(one).__name__}, expected an object")
    return [
        Turn("user", _check_text(one.get("user"), f"texts[{number}].user")),
        Turn("assistant", _check_text(one.get("assistant"), f"texts[{number}].assistant")),
    ]


def _parse_answer(row: Mapping[str, Any], name: str, parser: _MessageParser) -> tuple[list[Turn], Turn]:
    """Returns the messages that a field has before its answer, and the answer."""
    value = parse_text_or_list(row.get(name), name)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return [], Turn("assistant", _check_text(value, name))
    turns = [parser.parse_turn(number, message) for number, message in enumerate(value)]
    if not turns or turns[-1].role != "assistant":
        raise SampleRefusedError(f"{name} does not end with an answer")
    return turns[:-1], turns[-1]


class _MessageParser:
    """Parses messages as turns and collects the images of their items."""

    def __init__(self, ignored: Ignored) -> None:
        self.ignored = ignored
        self.images: list[Any] = []

    def parse_turn(self, number: int, message: Any) -> Turn:
        if not isinstance(message, dict):
            raise SampleRefusedError(f"turn {number} is {type(message).__name__}, expected an object")
        given = message.get("from") if message.get("from") is not None else message.get("role")
        role = _ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise SampleRefusedError(f"turn {number} is from {shorten(given)}, expected human, gpt or system")
        place = f"turn {number}"
        check_message_fields(message, self.ignored, place)
        content = message.get("value") if message.get("value") is not None else message.get("content")
        ids = _read_generated_ids(message, number, role)
        if isinstance(content, list):
            content = "".join(self._parse_item(place, item) for item in content)
        is_trained = role != "assistant" or _is_trained(message, place)
        return Turn(role, _check_text(content, place), is_trained, ids)

    def _parse_item(self, place: str, item: Any) -> str:
        if isinstance(item, str):
            return _check_text(item, place)
        kind = item.get("type") if isinstance(item, dict) else None
        if is_ignored_item(kind, self.ignored, place):
            return ""
        if kind in _TEXT_ITEMS:
            return _check_text(item.get("text"), place)
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
    """Returns whether an answer's tokens are labels."""
    given = {name: message[name] for name in ("weight", "loss") if message.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise SampleRefusedError(f"{place} has the {name} {shorten(value)}, expected 0 or 1 (false or true)")
    return all(given.values())


def _read_generated_ids(message: Mapping[str, Any], number: int, role: Role) -> tuple[int, ...] | None:
    ids = message.get(GENERATED_IDS)
    if ids is None:
        return None
    is_list = isinstance(ids, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
    if not is_list or role != "assistant":
        raise SampleRefusedError(
            f"turn {number} has {GENERATED_IDS} {shorten(ids)}, expected a list of token ids of an answer"
        )
    return tuple(ids)


def _collect_images(row: Mapping[str, Any], in_items: list[Any]) -> tuple[Any, ...]:
    """Returns the images that a row's fields or its messages name."""
    named = [_parse_image_list(row[name], name) for name in ("image", "images") if row.get(name) is not None]
    values = [value for name in named for value in (name if isinstance(name, list) else [name])]
    if values and in_items:
        raise SampleRefusedError("images stand both in the row and in its messages; leave one of them out")
    if len(named) == 2 and named[0] != named[1]:
        raise SampleRefusedError("the row has both image and images; leave one of them out")
    return tuple(in_items or (values if len(named) < 2 else values[: len(values) // 2]))


def _parse_image_list(value: Any, name: str) -> Any:
    """Returns a list of images, also from JSON text or a struct of lists; any other value unchanged."""
    is_text = isinstance(value, str) and not (value.startswith("[") and value.endswith("]"))
    found = value if is_text else parse_list(value, name)
    return found if isinstance(found, list) else value


def _check_order(turns: list[Turn]) -> None:
    roles = [turn.role for turn in turns if turn.role != "system"]
    if "system" in [turn.role for turn in turns[1:]]:
        raise SampleRefusedError("a system turn must come first")
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise SampleRefusedError("turns must alternate between human and gpt, from a question to an answer")


def _check_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise SampleRefusedError(f"{place} is {shorten(value)}, expected text")
    return check_encodable(value, place)
