from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_dump.prompts.image_tokens import expand_image_tokens
from teacher_dump.prompts.truncation import compute_kept_length

IMAGE = 9


def parse_drawing(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask of a drawing: i an image, q a token of a question, a of an answer."""
    return np.array([{"i": IMAGE, "q": 1, "a": 2}[one] for one in text], np.int32), np.array([c == "a" for c in text])


def kept(text: str, max_length: int, rule: str, *, per_image: int = 4) -> str | None:
    ids, mask = parse_drawing(text)
    grid = np.full(per_image, IMAGE, np.int64)
    positions = expand_image_tokens(ids, [grid] * text.count("i"), IMAGE).positions
    length = compute_kept_length(mask, positions, max_length=max_length, rule=rule)  # type: ignore[arg-type]
    return None if length is None else text[:length]


@pytest.mark.parametrize(
    ("text", "max_length", "turns", "answer"),
    [
        ("qqaaaqqaaa", 9, "qqaaa", "qqaaaqqaa"),
        ("qqaaaqqaaa", 7, "qqaaa", "qqaaa"),  # the next question fits, nothing of its answer does
        ("qqaaaqqaaa", 5, "qqaaa", "qqaaa"),
        ("qqaaaqqaaa", 4, None, "qqaa"),
        ("qqaaaqqaaa", 2, None, None),
        ("qiqaaqiqaaqa", 13, "qiqaa", "qiqaa"),  # 1 + 4 + 1 + 2 = 8 positions, then 1 + 4 of the next question
        ("qiqaaqiqaaqa", 14, "qiqaa", "qiqaa"),
        ("qiqaaqiqaaqa", 15, "qiqaa", "qiqaaqiqa"),
        ("qiqaaqiqaaqa", 16, "qiqaaqiqaa", "qiqaaqiqaa"),
        ("qiqaaqiqaaqa", 17, "qiqaaqiqaa", "qiqaaqiqaa"),
        ("iqaa", 3, None, None),
    ],
)
def test_cuts_by_hand(text: str, max_length: int, turns: str | None, answer: str | None) -> None:
    assert kept(text, max_length, "cut_turns") == turns
    assert kept(text, max_length, "cut_answer") == answer
    assert kept(text, max_length, "refuse") is None


conversations = st.lists(
    st.tuples(st.text("qi", min_size=1, max_size=4), st.integers(1, 4)), min_size=1, max_size=5
).map(lambda turns: "".join(asked + "a" * count for asked, count in turns))


@given(conversations, st.integers(1, 6), st.integers(1, 40))
def test_the_cut_is_the_longest_that_fits_and_that_the_rule_allows(text: str, per_image: int, max_length: int) -> None:
    def size(part: str) -> int:
        return len(part) + part.count("i") * (per_image - 1)

    if size(text) <= max_length:
        return
    prefixes = [text[:length] for length in range(1, len(text)) if size(text[:length]) <= max_length]
    whole = [part for part in prefixes if part[-1] == "a" and text[len(part)] != "a"]
    any_answer = [part for part in prefixes if part[-1] == "a"]
    assert kept(text, max_length, "cut_turns", per_image=per_image) == (whole[-1] if whole else None)
    assert kept(text, max_length, "cut_answer", per_image=per_image) == (any_answer[-1] if any_answer else None)
