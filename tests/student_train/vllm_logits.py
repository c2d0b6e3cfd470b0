"""`python -m tests.student_train.vllm_logits FOLDER`: how far vLLM's logits are from transformers' on a text prompt.

A process of its own: vLLM wants to be the first to import transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

VOCAB_SIZE = 300


def main(folder: Path) -> float:
    """The largest difference, as a fraction of the largest logit."""
    from teacher_dump.head import read_head
    from teacher_dump.teacher import TeacherPrompt
    from teacher_dump.vllm_teacher import VllmTeacher

    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE - 10, 24).astype(np.int32)
    engine = VllmTeacher(folder, dtype="float32", max_length=256, settings={}, served=folder.parent / "served")
    (states,) = engine.hidden_states([TeacherPrompt(ids, ())])
    got = read_head(folder, vocab_size=VOCAB_SIZE).stored().logits(states.hidden.numpy())
    from student_train.huggingface import load_weights

    with torch.no_grad():
        model = load_weights(folder).eval()
        expected = model(input_ids=torch.from_numpy(ids[None].astype(np.int64))).logits[0, :, :VOCAB_SIZE].numpy()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]))}\n")
