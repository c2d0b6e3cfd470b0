"""What every architecture's teacher is asked in the tests, and vLLM's answers, from one process for all of them.

`python -m tests.teacher_dump.architectures FOLDER NAME…` starts an engine on FOLDER/<name>/teacher for one architecture
after another, asks it in several ways and leaves its hidden states in FOLDER/<name>/<way>.npz.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from storage.selection import Threshold, TopK
from teacher_dump.data.partition import Part
from teacher_dump.prompts.preparation import PreparedSample
from teacher_dump.prompts.processor import load_processor
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.signals.lm_head import read_head
from teacher_dump.signals.pixel_check import check_pixel_values
from teacher_dump.signals.scoring import PartScorer
from teacher_dump.signals.spec import RowRequest, SignalRequest
from teacher_dump.signals.vision_check import VisionCheck, check_vision, choose_check_samples
from teacher_dump.teachers.teacher import Teacher, TeacherStates
from tests.teacher_dump.scorers import make_scorer, part_of
from tests.tiny_architectures import ARCHITECTURES, TEXT_ONLY, make_teacher
from tests.tiny_parts import VOCAB_SIZE

IMAGES = {"square": (32, 32), "other": (32, 32), "wide": (64, 32), "tall": (20, 90), "photo": (50, 40)}
WAYS = ("together", "reversed", "alone")
BATCHED_TOKENS = 160  # of the engine: the longest prompts are prefilled in two chunks
SCARCE = ("llava", "together")  # here an engine prefills many prompts at once without the memory: some begin again
_SCARCE_SETTINGS = {"long_prefill_token_threshold": 40, "kv_cache_memory_bytes": 600 * 1024}  # of 1024 bytes a token
SIGNALS = SignalRequest(
    response=RowRequest(TopK(VOCAB_SIZE), 0, (0.5, 2.0)),
    visual=RowRequest(Threshold(0.02), 0),
    relation_centered=True,
    sequence=True,
    hidden_limit=float("inf"),
)
ASKED: dict[str, tuple[list[str], list[str]]] = {  # images; questions and answers in turn
    "text": ([], ["what?", "red"]),
    "text-again": ([], ["what?", "the left half is red and the right blue"]),
    "long": ([], ["describe the image." * 20, "blue" * 20, "and now?", "red"]),
    "long-again": ([], ["describe the image." * 20, "blue" * 20, "and then?", "red"]),
    "square": (["square"], ["<image>\nwhat?", "red"]),
    "square-again": (["square"], ["<image>\nwhat?", "the left half is blue"]),
    "other": (["other"], ["<image>\nwhat?", "red"]),  # the same ids as `square`, another picture of its size
    "wide": (["wide"], ["<image>\nwhat?", "red", "and the right?", "blue", "sure?", "white"]),
    "tall": (["tall"], ["look: <image> what?", "red"]),
    "three": (["photo", "tall", "square"], ["<image> and <image>?", "green", "or <image>?", "white"]),
    "twice": (["square", "square"], ["<image><image> same?", "red"]),
    "not-twice": (["square", "other"], ["<image><image> same?", "red"]),
}


def write_samples(folder: Path, *, with_images: bool) -> Path:
    """Writes ASKED as a LLaVA JSONL file with noise images; for a text-only teacher without samples with images."""
    draw = np.random.default_rng(0)
    for name, (width, height) in IMAGES.items():
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    file = folder / "samples.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for name, (images, texts) in ASKED.items():
            if with_images or not images:
                turns = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]
                row = {"id": name, "image": [f"{image}.png" for image in images], "conversations": turns}
                lines.write(json.dumps(row) + "\n")
    return file


def make_all(root: Path) -> None:
    """Makes teachers and samples of all architectures."""
    for name in ARCHITECTURES:
        make_teacher(root / name / "teacher", name)
        write_samples(root / name, with_images=name not in TEXT_ONLY)


def make_architecture_scorer(folder: Path, engine: Teacher | None) -> PartScorer:
    """Makes a scorer of an architecture's samples with the given engine."""
    return make_scorer(folder / "teacher", folder, SIGNALS, engine, max_length=512)


def samples_of(folder: Path) -> Part:
    return part_of(folder / "samples.jsonl")


def make_prompt_key(prompt: TeacherPrompt) -> str:
    """Returns a key of a prompt's ids and pixels."""
    digest = hashlib.sha256(prompt.token_ids.tobytes())
    for image in prompt.images:
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


class RecordedTeacher:
    """A teacher that returns an engine's recorded states."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as arrays:
            self._states = {name: arrays[name] for name in arrays.files}

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        return [
            TeacherStates(self._states[f"{key}.ids"], torch.from_numpy(self._states[f"{key}.hidden"]))
            for key in map(make_prompt_key, prompts)
        ]


def read_vision_check(folder: Path) -> VisionCheck | None:
    """Changes that the vision check measured in the engine."""
    found = json.loads((folder / "sight.json").read_text(encoding="utf-8"))
    return None if found is None else VisionCheck(**found)


def _ask(engine: Teacher, ready: Sequence[PreparedSample], way: str) -> dict[str, np.ndarray]:
    prompts = [sample.prompt for sample in ready]
    if way == "reversed":
        prompts.reverse()
    calls = [[prompt] for prompt in prompts] if way == "alone" else [prompts]
    answers = {}
    for call in calls:
        for prompt, states in zip(call, engine.hidden_states(call), strict=True):
            key = make_prompt_key(prompt)
            answers |= {f"{key}.ids": states.token_ids, f"{key}.hidden": states.hidden.numpy()}
    return answers


def _run_engine(folder: Path) -> None:
    from teacher_dump.teachers.vllm_teacher import VllmTeacher

    settings: dict[str, Any] = {"max_num_batched_tokens": BATCHED_TOKENS, "enable_chunked_prefill": True}
    if folder.name in SCARCE:
        settings |= _SCARCE_SETTINGS
    engine = VllmTeacher(
        folder / "teacher", dtype="float32", max_length=512, settings=settings, served=folder / "served",
        remembered_images=5,  # the engine forgets them between some of the calls
    )  # fmt: skip
    scorer = make_architecture_scorer(folder, engine)
    part = samples_of(folder)
    ready = scorer.prepare(part.samples).ready
    for way in WAYS:
        before = engine.num_shared
        np.savez(folder / f"{way}.npz", allow_pickle=False, **_ask(engine, ready, way))
        assert (engine.num_shared > before) == (way != "alone" and (folder.name, way) != SCARCE), way
    head = read_head(folder / "teacher", vocab_size=VOCAB_SIZE)
    sight = check_vision(scorer, head, choose_check_samples(part.samples, 4))
    processor = load_processor(folder / "teacher")
    num_compared = check_pixel_values(engine, processor, ready, image_token_id=VOCAB_SIZE - 1)
    assert num_compared == sum(len(sample.images) for sample in ready), num_compared
    (folder / "sight.json").write_text(json.dumps(None if sight is None else asdict(sight)), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        _run_engine(Path(sys.argv[1]) / name)
        gc.collect()  # an engine that is let go of takes the process's groups with it: not those of the next one
