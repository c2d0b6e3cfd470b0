"""Questions whether a digit is there: true answers, half of them yes; misreadings that are wrong and plausible."""

import json

import numpy as np
import pytest

from examples.digits.claims import CHECKLIST, KINDS, Claim, ask_whether, checklist, lookalikes, misread
from examples.digits.make import make_pairs, write_data
from examples.digits.mosaics import WORDS, load_originals

ALIKE = lookalikes(load_originals("train"))


def is_there(question: str, digits: np.ndarray) -> bool:
    """The truth, read off the question's own words."""
    return question.split()[3] in [WORDS[digit] for digit in digits]


def verdict(claim: Claim) -> str:
    return claim.answer.split()[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true_and_half_of_them_yes(kind):
    rng = np.random.default_rng(0)
    answers = []
    for _ in range(2000):
        digits = rng.integers(0, 10, size=4)
        claim = ask_whether(kind, digits, ALIKE, rng)
        assert verdict(claim) == ("yes" if is_there(claim.question, digits) else "no"), (claim, digits)
        answers.append(verdict(claim))
    assert abs(answers.count("yes") / 2000 - 0.5) < 4 * (0.25 / 2000) ** 0.5


def test_questions_by_hand():
    digits, rng = np.array([7, 2, 0, 7]), np.random.default_rng(0)
    claims = {ask_whether(kind, digits, ALIKE, rng) for kind in KINDS for _ in range(300)}
    asked = {(claim.question, claim.answer) for claim in claims}
    assert {each for each in asked if not each[1].endswith("no")} == {
        ("Is there a seven in the picture?", "seven yes"),
        ("Is there a two in the picture?", "two yes"),
        ("Is there a zero in the picture?", "zero yes"),
    }
    assert ("Is there an eight in the picture?", "eight no") in asked
    assert len(asked) == 3 + 7


def test_an_alike_digit_is_absent_and_the_nearest_that_is():
    digits, rng = np.array([7, 7, 7, 7]), np.random.default_rng(1)
    claims = {ask_whether("exists_alike", digits, ALIKE, rng) for _ in range(50)}
    assert {(claim.asked, verdict(claim)) for claim in claims} == {(7, "yes"), (ALIKE[7][0], "no")}
    assert all(len(others) == 9 and digit not in others for digit, others in enumerate(ALIKE))


def test_four_equal_digits_can_be_asked_about():
    for kind in KINDS:
        for seed in range(20):
            claim = ask_whether(kind, np.full(4, 3), ALIKE, np.random.default_rng(seed))
            assert verdict(claim) == ("yes" if is_there(claim.question, np.full(4, 3)) else "no")


def test_a_misreading_is_one_digit_off_and_looks_like_it():
    rng = np.random.default_rng(2)
    words = ["The", "top", "row", "shows", "one", "and", "two"]
    for _ in range(50):
        wrong = misread(words, ALIKE, rng)
        ((old, new),) = [(a, b) for a, b in zip(words, wrong, strict=True) if a != b]
        assert WORDS.index(new) in ALIKE[WORDS.index(old)][:3]


def test_a_misread_claim_has_the_other_verdict():
    rng = np.random.default_rng(3)
    claimed = Claim(7, (1, 2, 0, 9)).misread(ALIKE, rng)  # the one of them that is most like a seven becomes one
    rank = [ALIKE[digit].index(7) for digit in (1, 2, 0, 9)]
    assert claimed.seen == tuple(7 if place == rank.index(min(rank)) else d for place, d in enumerate((1, 2, 0, 9)))
    assert verdict(claimed) == "yes"
    overlooked = Claim(7, (7, 2, 7, 9)).misread(ALIKE, rng)
    assert overlooked.answer == "seven no"
    assert (overlooked.seen[1], overlooked.seen[3]) == (2, 9)
    assert {overlooked.seen[0], overlooked.seen[2]} <= set(ALIKE[7][:3])


def test_a_checklist_by_hand():
    question, answer, wrong = checklist(np.array([7, 2, 0, 7]), np.random.default_rng(0))
    assert question == "Which digits are in the picture?"
    assert answer == (
        "zero yes one no two yes three no four no five no six no seven yes eight no nine no"  # a word and its verdict
    )
    ((old, new),) = [(a, b) for a, b in zip(answer.split(), wrong.split(), strict=True) if a != b]
    assert {old, new} == {"yes", "no"}


def test_added_questions_leave_all_else_as_it_is(tmp_path):
    common = {"teacher_mosaics": 3, "mosaics": 5, "test_mosaics": 3, "noise": 0.5, "seed": 0}
    write_data(tmp_path / "plain", **common)
    write_data(tmp_path / "more", **common, yes_no=2, preferences=6)
    assert not (tmp_path / "plain" / "pairs.jsonl").exists()
    for name in ("teacher_train", "train", "train_clean", "test"):
        lines = (tmp_path / "more" / f"{name}.jsonl").read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["category"] not in (*KINDS, CHECKLIST)]
        assert kept == (tmp_path / "plain" / f"{name}.jsonl").read_text().splitlines()
        added = {"teacher_train": 3 * 3, "test": 3 * 2}.get(name, 5 * 3)  # the test asks about one digit only
        assert len(lines) == len(kept) + added
    for image in (tmp_path / "plain" / "images").rglob("*.png"):
        other = tmp_path / "more" / "images" / image.relative_to(tmp_path / "plain" / "images")
        assert other.read_bytes() == image.read_bytes()


def test_pairs_differ_in_their_answers_and_the_chosen_one_is_right(tmp_path):
    write_data(tmp_path, teacher_mosaics=1, mosaics=1, test_mosaics=1, noise=0, seed=0, yes_no=1, preferences=60)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len({row["image"] for row in rows}) == len(rows) == 60
    assert 10 < sum(row["category"] in KINDS for row in rows) < 45
    originals = load_originals("train")
    asked = make_pairs(tmp_path / "again", "pairs", originals, num_mosaics=60, per_mosaic=4, seed=4, noise=1, yes_no=1)
    read = {
        pair.image: [WORDS.index(word) for word in pair.answer.split()] for pair in asked if pair.category == "read"
    }
    for row in rows:
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        digits = np.array(read[row["image"]])
        if row["category"] in KINDS:  # the rejected answer sees what is not there
            asked_for = question.split()[3]
            assert not is_there(question, digits)
            assert (row["chosen"], row["rejected"]) == (f"{asked_for} no", f"{asked_for} yes")
        else:
            assert len(row["chosen"].split()) == len(row["rejected"].split())
            assert {WORDS.index(word) for word in row["chosen"].split() if word in WORDS} <= set(digits.tolist())
    for row in rows:
        assert row["chosen"] != row["rejected"]
        assert [turn["from"] for turn in row["conversations"]] == ["human"]


def test_without_yes_no_questions_no_pair_is_one(tmp_path):
    write_data(tmp_path, teacher_mosaics=1, mosaics=1, test_mosaics=1, noise=0, seed=0, preferences=30)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert {row["category"] for row in rows} == {"place", "read", "caption"}
