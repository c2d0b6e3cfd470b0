"""Questions of the emoji experiment: what is held out is not seen, and no question gives its answer away."""

import json
from collections import Counter, defaultdict

import pytest

from examples.emoji.concepts import Concept, split_by_family
from examples.emoji.make import write_data
from examples.emoji.packages import STYLES
from examples.emoji.questions import (
    TASKS,
    Picture,
    Question,
    ask_held_out,
    ask_in_training,
    select_for_students,
    split_pictures,
)

CONCEPTS = [
    Concept(
        hexcode=f"{kind}{family:03}{variant}",
        name=f"thing {kind} {family} {variant}",
        kind=f"kind {kind}",
        group=f"group {'ABCDEFGHIJ'.index(kind) // 3}",
        translated=f"tipo {kind}",
    )
    for kind in "ABCDEFGHIJ"
    for family in range(50)
    for variant in (("", "-1") if family % 7 == 0 else ("",))
]
BEST_GUESS = {"kind": 0.3, "name": 0.1, "group": 0.55, "yes_no": 0.75, "kind_spanish": 0.3}  # with room for chance
SIDES = split_by_family(CONCEPTS, seed=0)
SPLIT = split_pictures(CONCEPTS, SIDES, seed=0)
ASKED = ask_in_training(SPLIT, seed=0)
HELD_OUT = {side: ask_held_out(SPLIT, side, num_per_task=30, seed=0) for side in ("validation", "test")}


def list_pictures(questions):
    return {question.picture for question in questions}


def test_no_picture_is_on_two_sides():
    sides = [list_pictures(ASKED), list_pictures(HELD_OUT["validation"]), list_pictures(HELD_OUT["test"])]
    assert all(sides)
    assert len(set.union(*sides)) == sum(len(side) for side in sides)
    assert set.union(*sides) <= set(SPLIT.pictures)
    assert len(set(SPLIT.pictures)) == len(SPLIT.pictures) == len(STYLES) * len(CONCEPTS)


def test_a_held_out_concept_is_unseen_but_for_names_which_are_of_concepts_seen_in_the_other_style():
    seen = defaultdict(set)
    for question in ASKED:
        if question.task == "name":
            seen[question.picture.concept].add(question.picture.style)
    families = {concept.family for concept in seen}
    for side, questions in HELD_OUT.items():
        for question in questions:
            concept = question.picture.concept
            if question.task == "name":
                assert seen[concept] == set(STYLES) - {question.picture.style}
            else:
                assert SIDES[concept.family] == side
                assert concept.family not in families


def test_every_task_is_asked_and_held_out_ones_equally_often():
    assert {question.task for question in ASKED} == set(TASKS)
    for questions in HELD_OUT.values():
        assert Counter(question.task for question in questions) == dict.fromkeys(TASKS, 30)
    few = ask_held_out(SPLIT, "validation", num_per_task=10**6, seed=0)
    assert Counter(question.task for question in few)["name"] == len(SPLIT.other_style["validation"])


def test_no_question_gives_its_answer_away():
    """The best guess from the words alone: the commonest answer to each wording in training."""
    common = defaultdict(Counter)
    for question in ASKED:
        common[question.text][question.answer] += 1
    for task in TASKS:
        held_out = [question for question in HELD_OUT["test"] if question.task == task]
        hits = [common[question.text].most_common(1)[0][0] == question.answer for question in held_out]
        assert sum(hits) / len(hits) < BEST_GUESS[task]
    wordings = {question.text for question in ASKED if question.task != "yes_no"}
    assert len(wordings) == len(TASKS) - 1
    assert not any(question.answer in question.text for question in [*ASKED, *HELD_OUT["test"]])


def test_yes_and_no_are_balanced_for_each_kind_that_is_named():
    counts = Counter((question.about, question.answer) for question in ASKED if question.task == "yes_no")
    kinds = {concept.kind for concept in CONCEPTS}
    assert {about for about, _ in counts} == kinds
    for kind in kinds:
        yes, no = counts[kind, "yes"], counts[kind, "no"]
        assert abs(no - yes) < 4 * yes**0.5  # no is drawn with the frequency of yes
    for questions in HELD_OUT.values():
        assert Counter(question.answer for question in questions if question.task == "yes_no") == {"yes": 15, "no": 15}


def test_answers_by_hand():
    picture = Picture(Concept("1F436", "dog face", "mammals", "animals & nature", "mamíferos"), "google")
    answers = {question.text: question.answer for question in [Question(picture, task, "mammals") for task in TASKS]}
    assert answers == {
        "What kind of thing is this?": "mammals",
        "What is this called?": "dog face",
        "Which group does this belong to?": "animals & nature",
        "Does this belong to the kind mammals?": "yes",
        "¿De qué tipo es esto?": "mamíferos",
    }
    assert Question(picture, "yes_no", "birds").answer == "no"
    assert json.loads(Question(picture, "yes_no", "birds").to_line()) == {
        "id": "yes_no-no-1F436-google",
        "image": "images/google/1F436.png",
        "category": "yes_no",
        "conversations": [
            {"from": "human", "value": "<image>\nDoes this belong to the kind birds?"},
            {"from": "gpt", "value": "no"},
        ],
    }


def test_students_get_a_part_of_the_questions_and_every_name_that_is_asked_later():
    part = select_for_students(ASKED, SPLIT, num=50)
    assert part[:50] == ASKED[:50]
    assert set(part) <= set(ASKED)
    assert len(set(part)) == len(part)
    named = {question.picture.concept for question in part if question.task == "name"}
    for questions in HELD_OUT.values():
        assert {question.picture.concept for question in questions if question.task == "name"} <= named


@pytest.mark.parametrize("seed", [0, 1])
def test_written_files_are_the_same_each_time(tmp_path, seed):
    drawings = {style: {concept.hexcode: style.encode() for concept in CONCEPTS} for style in STYLES}
    for name in ("first", "second"):
        write_data(tmp_path / name, CONCEPTS, drawings, train=60, validation=5, test=5, seed=seed)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    for path in files:
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes()
    rows = {
        name: [json.loads(line) for line in (tmp_path / "first" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("teacher_train", "train", "validation", "test")
    }
    assert {row["id"] for row in rows["train"]} <= {row["id"] for row in rows["teacher_train"]}
    for name in rows:
        assert len({row["id"] for row in rows[name]}) == len(rows[name])
        for row in rows[name]:
            assert (tmp_path / "first" / row["image"]).is_file()
