"""A cache over every kind of picture, and what its teacher's processor made of each.

`python -m tests.stillhouse.pixel_dumps FOLDER`: with vLLM, which wants to be the first to import transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from storage.identity import Identity
from storage.images.settings import PixelSettings
from storage.selection import TopK
from storage.writer.cache_writer import CacheWriter
from teacher_dump.data.image_loading import load_image
from teacher_dump.prompts.processor import load_processor
from teacher_dump.signals.lm_head import read_head
from teacher_dump.signals.spec import RowRequest, SignalRequest
from teacher_dump.signals.vision_check import check_vision, choose_check_samples
from teacher_dump.teachers import fingerprint
from teacher_dump.teachers.teacher import Teacher
from tests.storage.images.picture_files import BACKGROUND, make_picture_files
from tests.teacher_dump.scorers import make_scorer, part_of

PIXELS = PixelSettings(background=BACKGROUND)
ASKED = "what colour is the left half?"


def write_data(folder: Path) -> Path:
    """The files of the matrix and a JSONL file with one sample for each, named as its file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for file in make_picture_files():
        (folder / file.name).write_bytes(file.content)
        turns = [{"from": "human", "value": f"<image>\n{ASKED}"}, {"from": "gpt", "value": "red and blue"}]
        rows.append({"id": file.name, "image": file.name, "conversations": turns})
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder / "data.jsonl"


def dump_pictures(folder: Path, engine: Teacher) -> Path:
    """A sealed cache of FOLDER/teacher over FOLDER/data, at FOLDER/cache; the vision check passes first."""
    teacher, data = folder / "teacher", folder / "data" / "data.jsonl"
    request = SignalRequest(response=RowRequest(TopK(300), 0))
    scorer = make_scorer(teacher, data.parent, request, engine, pixels=PIXELS)
    part = part_of(data)
    chosen = choose_check_samples([sample for sample in part.samples if sample.id in ("exif-1", "exif-6", "rgba")], 3)
    sight = check_vision(scorer, read_head(teacher, vocab_size=300), chosen, pixels=PIXELS)
    assert sight is not None
    assert sight.turned is not None
    assert sight.marked is not None
    scored = scorer.score(part)
    assert not scored.records.errors
    facts = fingerprint.read_processor_facts(teacher, load_processor(teacher)).with_background(BACKGROUND)
    identity = Identity(
        teacher="tiny", teacher_fingerprint="a", dtype="float32", engine="a", chat_template_fingerprint="a",
        tokenizer_fingerprint=facts.tokenizer_fingerprint, vocab_size=facts.vocab_size, pixels=facts.pixels,
        image_preprocessing_fingerprint=facts.image_preprocessing_fingerprint, image_processor=facts.image_processor,
        image_token_id=facts.image_token_id, eos_token_ids=facts.eos_token_ids, plan_fingerprint="a", num_parts=1,
        image_root=str(data.parent), selection={"response": {"method": "topk", "k": 300}},
    )  # fmt: skip
    writer = CacheWriter.open(folder / "cache", identity, ("response",))
    writer.write_part(0, scored.records)
    writer.seal()
    return folder / "cache"


def main(folder: Path) -> None:
    """The cache, and the engine's pixel values by file."""
    from teacher_dump.prompts.teacher_prompt import TeacherPrompt
    from teacher_dump.teachers.vllm_teacher import VllmTeacher

    engine = VllmTeacher(folder / "teacher", dtype="float32", max_length=256, settings={}, served=folder / "served")
    dump_pictures(folder, engine)
    made: dict[str, Any] = {}
    for file in make_picture_files():
        pixels = load_image(folder / "data", file.name, PIXELS).pixels
        prompt = TeacherPrompt(np.array([5, 299, 6], np.int32), (pixels,), (file.name,))
        (values,) = engine.pixel_values(prompt)
        assert values is not None
        made[file.name] = values.numpy()
    np.savez(folder / "pixel_values.npz", allow_pickle=False, **made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
