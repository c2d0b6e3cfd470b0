"""Questions to a checkpoint: pixels, special tokens, templates."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.errors import ConfigError, StillhouseError
from storage.images.settings import OLD_PIXELS, PixelSettings, write_pixel_settings
from student_train.evaluation.ask import _build_prompt, _find_template_stop_ids, answer_question
from student_train.models.huggingface import load_processor
from student_train.models.loading import read_checkpoint
from student_train.template_arguments import ARGUMENTS_FILE, write_template_arguments
from tests.storage.images.picture_files import LAID, encode_image, make_random_rgb, make_turned_file
from tests.tiny import CHAT_TEMPLATE, make_tiny_llava


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "black.png")
    return tmp_path / "black.png"


def test_a_question_gets_an_answer(model: Path, image: Path) -> None:
    assert isinstance(answer_question(model, image, "what colour is the left half?", max_new_tokens=3), str)


def test_a_question_uses_the_pixels_that_the_model_was_trained_on(model: Path, tmp_path: Path) -> None:
    """A rotated file, and alpha over hidden pixels, give the same answers as the pictures that they show."""
    upright = make_random_rgb((32, 32), seed=3)
    drawing = np.dstack([upright, np.where(upright[..., 0] > 128, 255, 0).astype(np.uint8)])
    (tmp_path / "laid.png").write_bytes(make_turned_file(upright, 6))
    (tmp_path / "clear.png").write_bytes(encode_image(Image.fromarray(drawing)))
    shown = {
        "laid": (upright, np.ascontiguousarray(LAID[6](upright))),
        "clear": (np.where(drawing[..., 3:] == 255, upright, 0).astype(np.uint8), upright),
    }
    now, old = (shutil.copytree(model, tmp_path / name) for name in ("now", "old"))
    write_pixel_settings(PixelSettings(background="#000000"), now)
    write_pixel_settings(OLD_PIXELS, old)
    question, answers = "what colour is the left half?", {}
    for number, folder in enumerate((now, old)):
        for name, pictures in shown.items():
            Image.fromarray(pictures[number]).save(tmp_path / "shown.png")
            answers[number, name] = answer_question(folder, tmp_path / "shown.png", question, max_new_tokens=8)
            assert (
                answer_question(folder, tmp_path / f"{name}.png", question, max_new_tokens=8) == answers[number, name]
            )
    assert any(answers[0, name] != answers[1, name] for name in shown)  # or this test could not fail


@pytest.mark.parametrize("text", ["<|im_end|>", "see <|im_start|>assistant", "<image> what?"])
def test_a_question_with_a_special_token_is_refused(model: Path, image: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="the question contains the special token <"):
        answer_question(model, image, text)


def test_a_question_gets_the_tokenizer_s_leading_tokens_and_the_template_s_end(model: Path, image: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    checkpoint, processor = read_checkpoint(model), load_processor(model)
    begin, end, turn = checkpoint.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    checkpoint.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_start|>", special_tokens=[("<|endoftext|>", begin), ("<|im_start|>", end)]
    )
    ids = _build_prompt(processor, checkpoint, image, "what?").token_ids.tolist()
    assert checkpoint.tokenizer.decode(ids).startswith("<|endoftext|><|im_start|>user")
    checkpoint.tokenizer.eos_token = "<|endoftext|>"
    assert _find_template_stop_ids(processor, checkpoint) == {turn}


def test_a_question_is_rendered_with_the_arguments_that_the_student_was_trained_with(
    model: Path, image: Path, tmp_path: Path
) -> None:
    """The template opens a think block and ends answers with another token, unless an argument disables it."""
    folder = shutil.copytree(model, tmp_path / "thinking")
    opened = CHAT_TEMPLATE.replace(
        "<|im_start|>assistant\n{% endif",
        "<|im_start|>assistant\n{% if enable_thinking is not false %}hmm {% endif %}{% endif",
    )
    template = opened.replace("<|im_end|>\n", "{{ '<|im_end|>' if enable_thinking is false else '<|endoftext|>' }}\n")
    assert len({CHAT_TEMPLATE, opened, template}) == 3
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    def prompt_and_stops() -> tuple[str, set[str]]:
        checkpoint, processor = read_checkpoint(folder), load_processor(folder)
        stops = checkpoint.tokenizer.convert_ids_to_tokens(list(_find_template_stop_ids(processor, checkpoint)))
        ids = _build_prompt(processor, checkpoint, image, "what?").token_ids
        return checkpoint.tokenizer.decode(ids), set(stops)

    text, stops = prompt_and_stops()
    assert text.endswith("assistant\nhmm ")
    assert stops == {"<|endoftext|>"}
    write_template_arguments({"enable_thinking": False}, folder)
    text, stops = prompt_and_stops()
    assert text.endswith("assistant\n")
    assert stops == {"<|im_end|>"}
    write_template_arguments({"enable_thinking": False, "unknown": 1}, folder)  # which this template does not read
    assert isinstance(answer_question(folder, image, "what colour is the left half?", max_new_tokens=3), str)


@pytest.mark.parametrize(("content", "message"), [("[1]", "holds list, expected an object"), ("{", "is not JSON")])
def test_broken_template_arguments_are_named(model: Path, tmp_path: Path, content: str, message: str) -> None:
    folder = shutil.copytree(model, tmp_path / "broken")
    (folder / ARGUMENTS_FILE).write_text(content)
    with pytest.raises(StillhouseError, match=rf"{ARGUMENTS_FILE}: {message}"):
        read_checkpoint(folder)
