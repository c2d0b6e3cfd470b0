"""`python -m tests.student_train.vllm_logits FOLDER` prints the distance of vLLM's logits from transformers'.

Runs in a process of its own, since vLLM must be the first to import transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

VOCAB_SIZE = 300


def main(folder: Path) -> float:
    """Return the largest difference on a text and on an image question, as a fraction of the largest logit."""
    from teacher_dump.prompts.teacher_prompt import TeacherPrompt
    from teacher_dump.signals.lm_head import read_head
    from teacher_dump.teachers.vllm_teacher import VllmTeacher

    draw = np.random.default_rng(0)
    text = draw.integers(0, VOCAB_SIZE - 10, 24).astype(np.int32)
    about = np.insert(text, 3, VOCAB_SIZE - 1)
    picture = Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    engine = VllmTeacher(folder, dtype="float32", max_length=256, settings={}, served=folder.parent / "served")
    answers = engine.hidden_states([TeacherPrompt(text, ()), TeacherPrompt(about, (picture,))])
    head = read_head(folder, vocab_size=VOCAB_SIZE).stored()
    from student_train.models.huggingface import load_processor, load_weights

    model = load_weights(folder).eval()
    shown = load_processor(folder).image_processor(images=[picture], return_tensors="pt")
    differences = []
    for states, inputs in zip(answers, ({}, shown), strict=True):
        ids = torch.from_numpy(states.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            expected = model(input_ids=ids, **inputs).logits[0, :, :VOCAB_SIZE].numpy()
        differences.append(np.abs(head.logits(states.hidden.numpy()) - expected).max() / np.abs(expected).max())
    return float(max(differences))


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]))}\n")
