"""PaliGemma, whose images see the question: response rows by transformers; rows of images are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from storage.errors import ConfigError
from storage.selection import TopK
from student_train.models.loading import read_checkpoint
from teacher_dump.data.partition import Part
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.prompts.processor import load_processor
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.settings import read_settings
from teacher_dump.signals.spec import RowRequest, SignalRequest
from teacher_dump.teachers.transformers_teacher import TransformersTeacher
from tests.teacher_dump.conftest import WriteConfig
from tests.teacher_dump.scorers import make_scorer, part_of
from tests.tiny_gemma import make_paligemma2
from tests.tiny_parts import VOCAB_SIZE

# transformers' own processor converts tensors with numpy in a way that numpy deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
IMAGE_TOKEN_ID = VOCAB_SIZE - 1
ALL_ENTRIES = SignalRequest(response=RowRequest(TopK(1452), 0))
SAMPLES = {
    "red": ("<image>\nwhat?", "red"),
    "blue": ("<image>\nwhat?", "the left half is blue"),
    "other question": ("<image>\nand the right?", "red"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PaliGemma 2 in `teacher`, an image and samples.jsonl."""
    folder = tmp_path_factory.mktemp("paligemma")
    make_paligemma2(folder / "teacher")
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "noise.png")
    rows = [make_row(name, [*turns]) for name, turns in SAMPLES.items()]
    rows.append(make_row("two turns", ["<image>\nwhat?", "red", "sure?", "blue"]))
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


def make_row(name: str, texts: list[str]) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]
    return {"id": name, "image": "noise.png", "conversations": turns}


@pytest.fixture(scope="module")
def teacher(folder: Path) -> TransformersTeacher:
    return TransformersTeacher(folder / "teacher", dtype="float32", image_token_id=IMAGE_TOKEN_ID, settings={})


def test_answers_are_those_of_the_model_with_its_processor_s_own_inputs(
    folder: Path, teacher: TransformersTeacher
) -> None:
    """Ids, prefix attention and logits, with the answer as the processor's `suffix`."""
    processor = load_processor(folder / "teacher")
    part = part_of(folder / "samples.jsonl")
    scorer = make_scorer(folder / "teacher", folder, ALL_ENTRIES, teacher)
    part = Part(0, part.samples[:3], ())
    records = scorer.score(part).records
    ready = scorer.prepare(part.samples).ready
    assert not records.errors
    assert records.response is not None
    picture = Image.open(folder / "noise.png").convert("RGB")
    scored = zip(records.tokens, records.response, ready, SAMPLES.values(), strict=True)
    for tokens, rows, prepared, (question, answer) in scored:
        text = question.replace("<image>\n", "<image>")
        inputs = processor(images=[picture], text=[text], suffix=[answer], return_tensors="pt")
        labels = inputs.pop("labels")[0]
        assert inputs["input_ids"][0].tolist() == prepared.expansion.token_ids.tolist()
        assert np.array_equal(labels[labels >= 0], tokens.token_ids[tokens.response_mask])
        with torch.no_grad():
            logits = teacher._model(**inputs).logits[0, :, :1452].double()
        predicting = torch.nonzero(labels >= 0)[:, 0]
        logprobs = logits.log_softmax(dim=-1)[predicting - 1, labels[predicting]]
        assert rows.label_logprob is not None
        np.testing.assert_allclose(rows.label_logprob, logprobs, atol=5e-5)


def test_visual_states_depend_on_the_question(folder: Path, teacher: TransformersTeacher) -> None:
    """Why rows of images are refused: the same image after the same ids has other states for another question."""
    part = part_of(folder / "samples.jsonl")
    ready = make_scorer(folder / "teacher", folder, ALL_ENTRIES, teacher).prepare(part.samples).ready
    one, _, other, _ = ready
    (visual,) = one.expansion.visual
    assert one.record.images[0].key == other.record.images[0].key
    states = teacher.hidden_states([one.prompt, other.prompt])
    assert float((states[0].hidden[visual] - states[1].hidden[visual]).abs().amax(dim=-1).min()) > 0.01
    prompt = one.prompt  # and the question alone sees itself alike, with an answer or without
    asked = TeacherPrompt(prompt.token_ids[: np.argmax(one.record.response_mask)], prompt.images)
    (alone,) = teacher.hidden_states([asked])
    torch.testing.assert_close(states[0].hidden[: len(alone.hidden)], alone.hidden, rtol=0, atol=1e-4)


def test_a_second_answer_is_an_error_of_its_sample(folder: Path, teacher: TransformersTeacher) -> None:
    part = part_of(folder / "samples.jsonl")
    records = make_scorer(folder / "teacher", folder, ALL_ENTRIES, teacher).score(part).records
    assert [tokens.sample_id for tokens in records.tokens] == list(SAMPLES)
    (error,) = records.errors
    assert error.sample_id == "two turns"
    assert "has 2 answers, and this model answers one question" in error.reason


def test_rows_of_images_are_refused_by_name(folder: Path, write_config: WriteConfig) -> None:
    data = {"sources": [{"path": str(folder / "samples.jsonl")}]}
    teacher = {"model": str(folder / "teacher"), "backend": "transformers"}
    config = write_config(data=data, teacher=teacher)
    with pytest.raises(ConfigError, match=r"families names visual and relation, but images of a paligemma see the que"):
        plan_dump(read_settings(config))
    plan = plan_dump(read_settings(config, ["cache.families=[response]"]))
    assert plan.plan.num_samples == len(SAMPLES) + 1
    with pytest.raises(ConfigError, match=r"a paligemma cannot be a teacher with teacher\.backend: vllm"):
        plan_dump(read_settings(config, ["cache.families=[response]", "teacher.backend=vllm"]))


def test_it_cannot_be_a_student(folder: Path) -> None:
    with pytest.raises(ConfigError, match="a 'paligemma' cannot be a student: tokens before the answer see each other"):
        read_checkpoint(folder / "teacher")
