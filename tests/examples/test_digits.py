"""The digits experiment's data: held-out originals, answers that a person would give, a stated rate of noise."""

import json
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from examples.digits.make import make_pairs, write_data
from examples.digits.mosaics import CATEGORIES, WORDS, ask, draw_mosaics, load_originals, miswrite


def test_no_scan_is_in_two_splits():
    splits = [load_originals(name) for name in ("train", "validation", "test")]
    assert sum(len(split.labels) for split in splits) == 1797
    assert all(set(split.labels) == set(range(10)) for split in splits)
    # The data set itself holds no two equal scans, so equal pixels would be the same original.
    assert len({scan.tobytes() for split in splits for scan in split.images}) == 1797


def test_answers_by_hand():
    digits = np.array([7, 2, 0, 9])
    answers = {}
    for seed in range(40):
        for category in CATEGORIES:
            question, words, _ = ask(category, digits, np.random.default_rng(seed))
            answers[question] = " ".join(words)
    assert answers == {
        "Which digit is at the top left?": "seven",
        "Which digit is at the top right?": "two",
        "Which digit is at the bottom left?": "zero",
        "Which digit is at the bottom right?": "nine",
        "Read the digits row by row.": "seven two zero nine",
        "Describe the picture.": "The top row shows seven and two and the bottom row shows zero and nine",
        "What is the sum of the top row?": "nine",
        "What is the sum of the bottom row?": "nine",
    }


def test_mosaic_cells_lie_in_reading_order():
    originals = load_originals("train")
    mosaics = list(islice(draw_mosaics(originals, np.random.default_rng(0)), 400))
    cells = np.stack([pixels.reshape(2, 16, 2, 16).transpose(0, 2, 1, 3).reshape(4, -1) for pixels, _ in mosaics])
    digits = np.stack([labels for _, labels in mosaics])
    means = np.stack([cells[digits == label].mean(0) for label in range(10)])
    nearest = ((cells[:, :, None] - means) ** 2).sum(-1).argmin(-1)
    assert (nearest == digits).mean() > 0.75  # by chance 0.1


ANSWERS = [("seven", 10), ("The top row shows one and two", 10), ("nine", 19)]


@pytest.mark.parametrize(("answer", "num_choices"), ANSWERS)
def test_a_miswritten_answer_differs_in_exactly_one_number(answer, num_choices):
    rng, words = np.random.default_rng(1), answer.split()
    for _ in range(100):
        wrong = miswrite(words, num_choices, rng)
        changed = [index for index, (old, new) in enumerate(zip(words, wrong, strict=True)) if old != new]
        assert len(changed) == 1
        assert words[changed[0]] in WORDS
        assert wrong[changed[0]] in WORDS[:num_choices]


def test_noise_hits_the_stated_share(tmp_path):
    pairs = list(
        make_pairs(tmp_path, "train", load_originals("train"), num_mosaics=500, per_mosaic=2, seed=0, noise=0.5)
    )
    share = np.mean([pair.noisy != pair.answer for pair in pairs])
    assert abs(share - 0.5) < 4 * (0.25 / len(pairs)) ** 0.5


def test_written_data_is_llava_format_with_its_images(tmp_path):
    write_data(tmp_path, teacher_mosaics=3, mosaics=3, test_mosaics=2, noise=1.0, seed=0)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "train_clean", "validation", "test")
    }
    assert [row["id"] + "-clean" for row in rows["train"]] == [row["id"] for row in rows["train_clean"]]
    for noisy, clean in zip(rows["train"], rows["train_clean"], strict=True):
        assert noisy["image"] == clean["image"]
        assert noisy["conversations"][0] == clean["conversations"][0]
        assert noisy["conversations"][1] != clean["conversations"][1]
    for row in rows["validation"] + rows["test"]:
        assert row["conversations"][0]["value"].startswith("<image>\n")
        with Image.open(tmp_path / row["image"]) as image:
            assert image.size == (32, 32)
