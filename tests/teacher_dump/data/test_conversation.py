from __future__ import annotations

import json
from typing import Any

import pytest

from teacher_dump.data.conversation import Conversation, parse_conversation
from teacher_dump.data.sample import SampleRefusedError, Turn

USER, ASSISTANT = Turn("user", "<image>what?"), Turn("assistant", "red")
FROM_VALUE = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}]
ROLE_CONTENT = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "red"}]
SURE_YES, SURE_NO = (
    [{"role": "user", "content": "sure?"}, {"role": "assistant", "content": no}] for no in ("yes", "no")
)
BLUE = {"role": "assistant", "content": "blue"}
ITEMS = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]


def items(image: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [image, ITEMS[1]]}, {"role": "assistant", "content": "red"}]


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "conversations": FROM_VALUE},
        {"image": "a.png", "conversations": ROLE_CONTENT},
        {"images": ["a.png"], "messages": ROLE_CONTENT},
        {"images": ["a.png"], "messages": [{"role": "user", "content": ITEMS}, ROLE_CONTENT[1]]},
        {"images": [], "messages": items({"type": "image", "image": "a.png"})},
        {"messages": items({"type": "image", "path": "a.png"})},
        {"image": "a.png", "texts": [{"user": "<image>what?", "assistant": "red", "source": "x"}]},
        {"image": "a.png", "question": "<image>what?", "answer": "red"},
        {"image": "a.png", "images": "a.png", "question": "<image>what?", "answer": "red"},
        {"image": "a.png", "conversations": FROM_VALUE, "messages": None, "question": "not this"},
    ],
)
def test_every_shape_gives_the_same_conversation(row: dict[str, Any]) -> None:
    assert parse_conversation(row) == Conversation((USER, ASSISTANT), ("a.png",))


@pytest.mark.parametrize(
    "row",
    [
        {"question": "<image>what?", "chosen": "red", "rejected": "blue"},  # RLAIF-V
        {"conversations": FROM_VALUE[:1], "chosen": "red", "rejected": "blue"},
        {"conversations": FROM_VALUE[:1], "chosen": FROM_VALUE[1], "rejected": {"from": "gpt", "value": "blue"}},
        {"prompt": "<image>what?", "chosen": "red", "rejected": "blue"},
        {"prompt": [{"role": "user", "content": ITEMS}], "chosen": [ROLE_CONTENT[1]], "rejected": "blue"},
        {"chosen": ROLE_CONTENT, "rejected": [ROLE_CONTENT[0], {"role": "assistant", "content": "blue"}]},
    ],
)
def test_every_shape_of_a_pair_gives_two_answers_to_one_question(row: dict[str, Any]) -> None:
    row["image"] = {"bytes": b"x", "path": None}
    got = parse_conversation(row)
    assert got == Conversation((USER, ASSISTANT), (row["image"],), rejected=Turn("assistant", "blue"))


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [*FROM_VALUE, {"from": "human", "value": "sure?"}], "chosen": "yes", "rejected": "no"},
        {"texts": [{"user": "<image>what?", "assistant": "red"}], "chosen": SURE_YES, "rejected": SURE_NO},
        {"chosen": [*ROLE_CONTENT, *SURE_YES], "rejected": [*ROLE_CONTENT, *SURE_NO]},
    ],
)
def test_a_pair_may_be_the_end_of_a_longer_conversation(row: dict[str, Any]) -> None:
    got = parse_conversation({**row, "image": "a.png"})
    turns = (USER, ASSISTANT, Turn("user", "sure?"), Turn("assistant", "yes"))
    assert got == Conversation(turns, ("a.png",), rejected=Turn("assistant", "no"))


@pytest.mark.parametrize(
    "told",
    [
        {"prompt": "<image>what?"},
        {"messages": ROLE_CONTENT},
        {"prompt": "<image>what?", "messages": [ROLE_CONTENT[0], BLUE]},
        {"messages": items({"type": "image", "image": "a.png"})},
    ],
)
def test_a_conversation_that_a_pair_repeats_is_read_once(told: dict[str, Any]) -> None:
    image = {"type": "image", "image": "a.png"}
    chosen, (question, _) = items(image), items(image)
    got = parse_conversation({**told, "chosen": chosen, "rejected": [question, BLUE]})
    assert got == Conversation((USER, ASSISTANT), ("a.png",), rejected=Turn("assistant", "blue"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [ROLE_CONTENT[0], SURE_NO[1]], "chosen": ROLE_CONTENT, "rejected": [ROLE_CONTENT[0], BLUE]},
            "messages and chosen begin alike but differ later; leave messages out",
        ),
        (
            {
                "messages": [{"role": "system", "content": "be brief"}, *ROLE_CONTENT],
                "chosen": ROLE_CONTENT,
                "rejected": [ROLE_CONTENT[0], BLUE],
            },
            "messages and chosen begin alike",
        ),
        ({}, "conversations is missing"),
        ({"messages": "text"}, "messages is 'text', expected a list"),
        ({"texts": ["text"]}, r"texts\[0\] is str"),
        ({"question": "what?"}, "answer is None"),
        ({"question": "what?", "chosen": "red"}, "rejected is None"),
        ({"question": 3, "chosen": "red", "rejected": "blue"}, "question is 3"),
        ({"conversations": FROM_VALUE, "chosen": "red", "rejected": "blue"}, "alternate"),
        ({"chosen": "red", "rejected": "blue"}, "alternate"),
        ({"chosen": ROLE_CONTENT, "rejected": "blue"}, "different prompts"),
        ({"chosen": [], "rejected": []}, "does not end with an answer"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "type 'video'"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "is from"),
        ({"image": "b.png", "messages": items({"type": "image", "image": "a.png"})}, "both in the row"),
        ({"image": "b.png", "images": ["a.png"], "question": "q", "answer": "a"}, "both image and images"),
        ({"question": "q\ud800", "answer": "a"}, "Unicode"),
        ({"question": "q", "answer": ["x" * 10_000]}, "answer is"),
    ],
)
def test_broken_rows_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleRefusedError, match=reason) as raised:
        parse_conversation(row)
    assert len(str(raised.value)) < 300


QUESTION = {"role": "user", "content": "<image>what?"}
ANSWER = {"role": "assistant", "content": "red"}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": json.dumps(FROM_VALUE)},
        {"messages": json.dumps(ROLE_CONTENT)},
        {"conversations": {"from": ["human", "gpt"], "value": ["<image>what?", "red"]}},
        {"messages": json.dumps({"role": ["user", "assistant"], "content": ["<image>what?", "red"]})},
        {"texts": {"user": ["<image>what?"], "assistant": ["red"], "source": None}},
        {"prompt": "<image>what?", "completion": "red"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": json.dumps([QUESTION]), "completion": ANSWER, "label": True},
    ],
)
def test_lists_in_other_forms_and_completions_are_read(row: dict[str, Any]) -> None:
    for image in ("a.png", ["a.png"], '["a.png"]'):
        assert parse_conversation({**row, "images": image}) == Conversation((USER, ASSISTANT), ("a.png",))


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_a_system_field_is_the_system_turn(field: str) -> None:
    system = Turn("system", "be brief")
    row = {"question": "q", "answer": "a", field: "be brief"}
    assert parse_conversation(row).turns == (system, Turn("user", "q"), Turn("assistant", "a"))
    assert parse_conversation(row, only_questions=True).turns[0] == system
    assert parse_conversation({"question": "q", "chosen": "a", "rejected": "b", field: "be brief"}).turns[0] == system
    said_twice = {"messages": [{"role": "system", "content": "be brief"}, *ROLE_CONTENT], field: "be brief"}
    assert [turn.role for turn in parse_conversation(said_twice).turns] == ["system", "user", "assistant"]
    with pytest.raises(SampleRefusedError, match="differ"):
        parse_conversation({**said_twice, field: "be long"})
    with pytest.raises(SampleRefusedError, match=f"{field} is 7"):
        parse_conversation({**row, field: 7})


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"loss": False, "weight": 1}])
def test_an_answer_without_weight_is_no_label(flag: dict[str, Any]) -> None:
    first = [QUESTION, {**ANSWER, **flag}]
    got = parse_conversation({"messages": [*first, *SURE_YES]}).turns
    assert [turn.is_trained for turn in got] == [True, False, True, True]
    asked = parse_conversation({"messages": [*first, *SURE_YES]}, only_questions=True).turns
    assert [turn.is_trained for turn in asked] == [True, False, True, True]
    for row in ({"messages": first}, {"prompt": [QUESTION], "chosen": [{**ANSWER, **flag}], "rejected": "blue"}):
        with pytest.raises(SampleRefusedError, match="no answer is a label"):
            parse_conversation(row)


@pytest.mark.parametrize("flag", [{"weight": 0.5}, {"weight": "0"}, {"loss": 2}, {"loss": "last"}])
def test_a_weight_that_is_neither_0_nor_1_is_refused(flag: dict[str, Any]) -> None:
    with pytest.raises(SampleRefusedError, match=f"turn 1 has the {next(iter(flag))} "):
        parse_conversation({"messages": [QUESTION, {**ANSWER, **flag}]})


def unread(place: str, value: Any) -> dict[str, Any]:
    if place == "row":
        return {"messages": ROLE_CONTENT, **value}
    if place == "text":
        return {"question": f"look {value} here", "answer": "red"}
    if place == "answer":
        return {"messages": [QUESTION, {**ANSWER, **value}]}
    return {"messages": [{"role": "user", "content": [value, {"type": "text", "text": "what?"}]}, ANSWER]}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("video", unread("row", {"video": "a.mp4"})),
        ("video", unread("row", {"videos": ["a.mp4"]})),
        ("video", unread("item", {"type": "video", "video": "a.mp4"})),
        ("video", unread("item", {"type": "video_url", "video_url": {"url": "a.mp4"}})),
        ("audio", unread("row", {"audio": {"bytes": b"x"}})),
        ("audio", unread("row", {"audios": ["a.wav"]})),
        ("audio", unread("item", {"type": "input_audio", "input_audio": {"data": "x"}})),
        ("tools", unread("row", {"tools": [{"name": "f"}]})),
        ("tools", unread("row", {"tools": '[{"name": "f"}]'})),
        ("tools", unread("answer", {"tool_calls": [{"name": "f"}]})),
        ("tools", unread("answer", {"function_call": {"name": "f"}})),
        ("reasoning_content", unread("answer", {"reasoning_content": "hm"})),
        ("reasoning_content", unread("answer", {"thinking": "hm"})),
        ("<video>", unread("text", "<video>")),
        ("<audio>", unread("text", "<audio>")),
        ("<img>", unread("text", "<img>a/b.png</img>")),
        ("<image 1>", unread("text", "<image 1>")),
        ("<image 1>", unread("text", "<image_12>")),
        ("<ImageHere>", unread("text", "<ImageHere>")),
    ],
)
def test_what_is_not_read_is_refused_by_name_unless_the_source_ignores_it(name: Any, row: dict[str, Any]) -> None:
    with pytest.raises(SampleRefusedError, match="which is not read") as raised:
        parse_conversation(row)
    shown = f'"{name}"' if name.startswith("<") else name
    assert f"ignore: [{shown}]" in str(raised.value)
    got = parse_conversation(row, ignored=frozenset([name]))
    assert [turn.role for turn in got.turns] == ["user", "assistant"]
    assert parse_conversation({**row, "videos": [], "tools": None, "audio": ""}, ignored=frozenset([name])) == got


def test_images_of_a_message_and_unwanted_completions_are_refused() -> None:
    with pytest.raises(SampleRefusedError, match="turn 0 has images of its own"):
        parse_conversation({"messages": [{**QUESTION, "images": ["a.png"]}, ANSWER]})
    with pytest.raises(SampleRefusedError, match="label is false"):
        parse_conversation({"prompt": "q", "completion": "a", "label": False})
