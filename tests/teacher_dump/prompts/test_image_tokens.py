from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from teacher_dump.data.sample import SampleRefusedError
from teacher_dump.prompts.image_tokens import VisualGrid, expand_image_tokens
from teacher_dump.prompts.processor import load_processor
from tests.tiny import make_tiny_tokenizer

IDS = np.array([5, 9, 6, 9, 9, 7], np.int32)  # 9 is the placeholder


def plain(*counts: int) -> list[np.ndarray]:
    """Images of visual tokens only."""
    return [np.full(count, 9) for count in counts]


def test_positions_by_hand() -> None:
    expansion = expand_image_tokens(IDS, plain(3, 1, 2), 9)
    assert expansion.token_ids.tolist() == [5, 9, 9, 9, 6, 9, 9, 9, 7]
    assert expansion.positions.tolist() == [0, 1, 4, 5, 6, 8]
    assert [places.tolist() for places in expansion.visual] == [[1, 2, 3], [5], [6, 7]]


def test_separators_by_hand() -> None:
    """One image between 20 and 21, of two tiles that 22 parts; another that is as long as its placeholder."""
    tiles = np.array([20, 9, 9, 22, 9, 9, 21])
    expansion = expand_image_tokens(np.array([5, 9, 6, 9], np.int32), [tiles, np.array([9])], 9)
    assert expansion.token_ids.tolist() == [5, 20, 9, 9, 22, 9, 9, 21, 6, 9]
    assert expansion.positions.tolist() == [0, 1, 8, 9]
    assert [places.tolist() for places in expansion.visual] == [[2, 3, 5, 6], [9]]


def test_response_rows_sit_one_position_before_their_tokens() -> None:
    """The classic off-by-one: answer tokens 6 and 7 are predicted at positions 3 and 7 of the expanded ids."""
    expansion = expand_image_tokens(IDS, plain(3, 1, 2), 9)
    mask = np.array([False, False, True, False, False, True])
    predicting = expansion.positions[mask] - 1
    assert predicting.tolist() == [3, 7]
    assert expansion.token_ids[predicting + 1].tolist() == IDS[mask].tolist()


def test_without_images_nothing_moves() -> None:
    expansion = expand_image_tokens(np.array([1, 2, 3], np.int32), [], -1)
    assert expansion.positions.tolist() == [0, 1, 2]
    assert expansion.visual == ()


def test_a_wrong_number_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="3 placeholders for 2 images"):
        expand_image_tokens(IDS, plain(3, 1), 9)


@pytest.mark.parametrize(
    ("engine_ids", "message"),
    [
        ([5, 9, 9, 9, 6, 9, 9, 8, 7], "position 7: the engine has token 8, expected 9"),
        ([5, 9, 9, 9, 6, 9, 9, 9], "8 positions, expected 9"),
        ([5, 9, 9, 9, 6, 9, 9, 9, 7, 7], "10 positions, expected 9"),
    ],
)
def test_the_first_different_token_of_an_expansion_is_described(engine_ids: list[int], message: str) -> None:
    expansion = expand_image_tokens(IDS, plain(3, 1, 2), 9)
    assert expansion.describe_difference(expansion.token_ids) == ""
    assert message in expansion.describe_difference(np.array(engine_ids))


def test_the_grid_is_what_the_processor_makes_of_an_image(tiny_teacher: Path) -> None:
    grid = VisualGrid(load_processor(tiny_teacher), 299)
    assert grid.ids(Image.new("RGB", (32, 32))).tolist() == [299] * 16
    assert grid.ids(Image.new("RGB", (100, 20))).tolist() == [299] * 16


def test_an_image_that_the_processor_refuses_costs_its_sample_only() -> None:
    def stretched(**asked: Any) -> None:
        raise ValueError("absolute aspect ratio must be smaller than 200")

    stretched.tokenizer = make_tiny_tokenizer()  # type: ignore[attr-defined]
    with pytest.raises(SampleRefusedError, match="refuses an image of 900 x 2: absolute aspect ratio"):
        VisualGrid(stretched, 299).ids(Image.new("RGB", (900, 2)))
