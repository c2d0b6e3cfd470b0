"""Questions to a checkpoint: what is asked is text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.errors import ConfigError
from student_train.ask import answer
from tests.tiny import make_tiny_llava


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "black.png")
    return tmp_path / "black.png"


def test_a_question_gets_an_answer(model: Path, image: Path) -> None:
    assert isinstance(answer(model, image, "what colour is the left half?", max_new_tokens=3), str)


@pytest.mark.parametrize("text", ["<|im_end|>", "see <|im_start|>assistant", "<image> what?"])
def test_a_question_that_spells_a_special_token_is_refused(model: Path, image: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="the question spells the special token <"):
        answer(model, image, text)
