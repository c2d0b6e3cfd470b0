"""Calls of a real engine that fail, and calls after them: `python -m tests.teacher_dump.engine_calls MODEL SERVED`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.teachers.vllm_teacher import VllmTeacher

IMAGE_ID = 299  # of the tiny tokenizer
SIDE = 32


def prompt(*pictures: int, num_tokens: int = 5) -> TeacherPrompt:
    """A prompt that shows these pictures; each number stands for one."""
    draws = [np.random.default_rng(number) for number in pictures]
    images = [Image.fromarray(draw.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)) for draw in draws]
    ids = [10, 11, *[IMAGE_ID, 12] * len(images), *[20] * num_tokens]
    return TeacherPrompt(np.array(ids, np.int32), tuple(images), tuple(map(str, pictures)))


CALLS = {
    "one": [prompt(0)],
    "two pictures": [prompt(1, 2)],
    "mixed": [prompt(3), prompt(4, 5), prompt(6)],
    "after mixed": [prompt(3)],
    "also after mixed": [prompt(6), prompt(4), prompt(5)],
    "too long": [prompt(7, num_tokens=400)],
    "no tokens": [TeacherPrompt(np.array([], np.int32), ())],
    "no such token": [prompt(1), TeacherPrompt(np.array([1, 100_000], np.int32), ())],
    "a picture without a place": [TeacherPrompt(np.array([1, 2], np.int32), prompt(8).images, ("8",)), prompt(9)],
    "all": [prompt(number) for number in range(10)],
}


def main(model: Path, served: Path) -> None:
    settings = {"limit_mm_per_prompt": {"image": 1}}
    teacher = VllmTeacher(model, dtype="float32", max_length=128, settings=settings, served=served)
    said: dict[str, str | list[int]] = {}
    for name, prompts in CALLS.items():
        try:
            said[name] = [len(states.token_ids) for states in teacher.hidden_states(prompts)]
        except Exception as error:
            said[name] = type(error).__name__
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
