"""Placeholders of images: unchanged for most processors; Gemma 3's and PaliGemma's write text around an image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from storage.errors import StillhouseError
from storage.images.placeholders import get_placeholder, keep_image_ids, write_visual_tokens


def make_processor(**fields: Any) -> Any:
    return SimpleNamespace(tokenizer=SimpleNamespace(image_token="<soft>"), **fields)


def keep(processor: Any, *ids: int) -> list[int]:
    kept = keep_image_ids(np.array(ids, np.int64), processor, image_token="<soft>", image_token_id=9)
    return kept.tolist()


def test_a_processor_with_one_token_for_both_is_left_alone() -> None:
    for processor in (make_processor(image_token="<soft>", full_image_sequence="(<soft><soft>)"), make_processor()):
        assert get_placeholder(processor, "<soft>") == "<soft>"
        assert write_visual_tokens("a <soft> b <begin>", processor) == "a <soft> b <begin>"
        assert keep(processor, 1, 9, 9, 2) == [1, 9, 9, 2]  # separators are part of an image's ids
    tokenizer = SimpleNamespace(image_token="<soft>")  # a text-only teacher has no processor
    assert write_visual_tokens("a <soft>", tokenizer) == "a <soft>"


def test_a_processor_that_writes_around_an_image_keeps_its_visual_tokens_alone() -> None:
    processor = make_processor(image_token="<begin>", full_image_sequence="\n\n<begin><soft><soft><soft><end>\n\n")
    assert get_placeholder(processor, "<soft>") == "<begin>"
    run = "\n\n<begin><soft><end>\n\n"
    assert write_visual_tokens("user\n<begin>what? <begin>", processor) == f"user\n{run}what? {run}"
    assert keep(processor, 1, 2, 9, 9, 9, 3) == [9, 9, 9]
    assert keep(processor, 1, 2) == []
    with pytest.raises(StillhouseError, match=r"adds crops of an image \(pan and scan\).*set do_pan_and_scan to false"):
        keep(processor, 9, 9, 5, 9, 9)


def test_what_paligemma_writes_after_an_image_is_the_templates() -> None:
    class PaliGemmaProcessor(SimpleNamespace):
        pass

    processor = PaliGemmaProcessor(tokenizer=SimpleNamespace(image_token="<soft>"), image_token="<soft>")
    assert keep(processor, 9, 9, 1, 2) == [9, 9]
    assert write_visual_tokens("<soft>", processor) == "<soft>"
