"""POPE's scores, worked by hand."""

import pytest

from student_train.evaluation.hallucination import compute_unsupported_rate, score_yes_no


def test_scores_by_hand():
    # Four questions whose answer is yes, three of them found; five whose answer is no, two of them claimed.
    answers = [("yes", "yes")] * 3 + [("no", "yes")] + [("yes", "no")] * 2 + [("no", "no")] * 2 + [("seven", "no")]
    scores = score_yes_no(
        [*answers, ("seven", "seven"), ("yes", "yes-men no one")]
    )  # the last two are no such questions
    assert scores == {
        "num": 9,
        "accuracy": pytest.approx(5 / 9),
        "hallucination_rate": pytest.approx(2 / 5),
        "yes_ratio": pytest.approx(5 / 9),
        "precision": pytest.approx(3 / 5),
        "recall": pytest.approx(3 / 4),
        "num_neither": 1,
    }


@pytest.mark.parametrize("answer", ["Yes", "yes, there is", "Yes.", '"yes" it is', "YES!", "yes or no", "two so yes."])
def test_the_first_word_decides_or_else_the_last(answer):
    scores = score_yes_no([(answer, "No, one is not")])
    assert scores is not None
    assert scores["hallucination_rate"] == 1


@pytest.mark.parametrize("answer", ["", "yesterday", "a yes it is", "not sure"])
def test_an_answer_with_neither_yes_nor_no_is_wrong(answer):
    scores = score_yes_no([(answer, "seven two so no")])
    assert scores is not None
    assert (scores["accuracy"], scores["hallucination_rate"], scores["num_neither"]) == (0, 0, 1)


def test_rates_over_no_questions_are_none():
    assert score_yes_no([]) is None
    assert score_yes_no([("yes", "seven")]) is None
    scores = score_yes_no([("no", "yes")])
    assert scores is not None
    assert (scores["hallucination_rate"], scores["precision"], scores["recall"]) == (None, None, 0)


def test_words_without_support_by_hand():
    answers = [("one two", "Two one"), ("one three", "one two"), ("one", "one two"), ("", "one")]
    assert compute_unsupported_rate(answers) == 1 / 4  # the second; order and omissions claim nothing
    assert compute_unsupported_rate([]) is None


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("red.", "red"), ("“Red”, or blue!", "blue red or"), ("red - blue", "blue - red"), ("…", "red")],
)
def test_punctuation_at_the_ends_of_words_is_ignored(answer, reference):
    assert compute_unsupported_rate([(answer, reference)]) == 0


@pytest.mark.parametrize(
    ("answer", "reference"), [("-5", "5"), ("50%", "50"), ("red-blue", "red blue"), ("it's", "its")]
)
def test_other_characters_make_another_word(answer, reference):
    assert compute_unsupported_rate([(answer, reference)]) == 1
