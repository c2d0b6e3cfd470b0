from __future__ import annotations

from typing import Any

import pytest

from teacher_dump.conversation import Conversation, parse_conversation
from teacher_dump.samples import SampleRefusedError, Turn

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
def test_a_conversation_that_a_pair_tells_twice_is_taken_once(told: dict[str, Any]) -> None:
    image = {"type": "image", "image": "a.png"}
    chosen, (question, _) = items(image), items(image)
    got = parse_conversation({**told, "chosen": chosen, "rejected": [question, BLUE]})
    assert got == Conversation((USER, ASSISTANT), ("a.png",), rejected=Turn("assistant", "blue"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [ROLE_CONTENT[0], SURE_NO[1]], "chosen": ROLE_CONTENT, "rejected": [ROLE_CONTENT[0], BLUE]},
            "messages and chosen begin alike and go on otherwise; leave messages out",
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
        ({"messages": "text"}, "messages is missing or empty"),
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
