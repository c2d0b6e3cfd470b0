from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from storage.records.preference_pairs import check_pairs
from storage.records.records import PartRecords, SampleError
from teacher_dump.prompts.processor import load_processor
from teacher_dump.signals.spec import SignalRequest
from tests.teacher_dump.scorers import EVERYTHING, make_scorer, part_of, reference_teacher

SEQUENCE = SignalRequest(sequence=True)


def write_pairs(folder: Path, answers: dict[str, tuple[str, ...]], images: dict[str, str] | None = None) -> Path:
    """Writes rows of one question about one image, with an answer or with a chosen and a rejected one, by id."""
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    Image.new("RGB", (32, 32), "blue").save(folder / "blue.png")
    rows = []
    for name, texts in answers.items():
        fields = zip(("answer",) if len(texts) == 1 else ("chosen", "rejected"), texts, strict=True)
        image = (images or {}).get(name, "red.png")
        rows.append({"id": name, "image": image, "question": "<image>\nwhat colour?", **dict(fields)})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_sequence_logprobs_are_the_sums_of_the_models_own(tmp_path: Path, tiny_teacher: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(tiny_teacher).eval()
    processor = load_processor(tiny_teacher)
    file = write_pairs(tmp_path, {"a": ("red", "the left half is blue"), "b": ("red red",)})
    scored = make_scorer(tiny_teacher, tmp_path, SEQUENCE, reference_teacher(tiny_teacher)).score(part_of(file))
    records = scored.records
    assert records.response is None
    assert records.sequence is not None
    for record, sequence in zip(records.tokens, records.sequence, strict=True):
        text = processor.tokenizer.decode(record.token_ids)
        inputs = processor(images=[Image.open(tmp_path / "red.png")], text=[text], return_tensors="pt")
        with torch.inference_mode():
            logprobs = model(**inputs).logits[0, :, :300].double().log_softmax(dim=-1)
        total = 0.0
        ids = inputs["input_ids"][0]
        for position in range(len(ids) - record.num_response_tokens, len(ids)):
            total += float(logprobs[position - 1, ids[position]])
        assert sequence.num_tokens == record.num_response_tokens
        assert sequence.logprob == pytest.approx(total, abs=1e-4)
        assert float(np.float32(sequence.logprob)) == sequence.logprob


def test_sequence_logprobs_beside_response_rows_are_the_same(tmp_path: Path, tiny_teacher: Path) -> None:
    file = write_pairs(tmp_path, {"a": ("red", "blue and white")})
    teacher = reference_teacher(tiny_teacher)
    alone = make_scorer(tiny_teacher, tmp_path, SEQUENCE, teacher).score(part_of(file)).records
    both = dataclasses.replace(EVERYTHING, sequence=True)
    beside = make_scorer(tiny_teacher, tmp_path, both, teacher).score(part_of(file)).records
    assert alone.sequence is not None
    assert beside.sequence is not None
    assert [one.num_tokens for one in alone.sequence] == [one.num_tokens for one in beside.sequence]
    for one, other in zip(alone.sequence, beside.sequence, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_pair_after_earlier_answers_is_scored_by_its_last_ones(tmp_path: Path, tiny_teacher: Path) -> None:
    """The summed rows are those of the same conversation as an ordinary sample, from the last answer on."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    turns = [
        {"from": "human", "value": "<image>\nwhat colour?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "and on the right?"},
    ]
    pair = {"id": "a", "image": "red.png", "conversations": turns, "chosen": "red too", "rejected": "blue"}
    plain = {"id": "p", "image": "red.png", "conversations": [*turns, {"from": "gpt", "value": "red too"}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(pair)}\n{json.dumps(plain)}\n", encoding="utf-8")
    both = dataclasses.replace(EVERYTHING, sequence=True)
    scorer = make_scorer(tiny_teacher, tmp_path, both, reference_teacher(tiny_teacher))
    records = scorer.score(part_of(tmp_path / "rows.jsonl")).records
    assert [record.sample_id for record in records.tokens] == ["a#chosen", "a#rejected", "p"]
    check_pairs(records.tokens)
    assert records.sequence is not None
    assert records.response is not None
    tokenizer = load_processor(tiny_teacher).tokenizer
    answers = [tokenizer.decode(record.token_ids[record.response_mask]) for record in records.tokens]
    assert answers == ["red too<|im_end|>", "blue<|im_end|>", "red<|im_end|>red too<|im_end|>"]
    of_plain = records.response[2].label_logprob
    assert of_plain is not None
    chosen = records.sequence[0]
    assert chosen.num_tokens == records.tokens[0].num_response_tokens < len(of_plain)
    assert chosen.logprob == pytest.approx(float(of_plain[-chosen.num_tokens :].sum()), abs=1e-4)


def test_an_error_on_one_half_reports_both_and_leaves_nothing_behind(tmp_path: Path, tiny_teacher: Path) -> None:
    answers = {"a": ("red", " "), "b": ("red", "blue"), "c": ("red",), "d": ("x", "y")}
    part = part_of(write_pairs(tmp_path, answers, {"a": "blue.png"}))
    part = dataclasses.replace(part, samples=[sample for sample in part.samples if sample.id != "d#rejected"])
    everything = dataclasses.replace(EVERYTHING, sequence=True, images=True)
    scorer = make_scorer(tiny_teacher, tmp_path, everything, reference_teacher(tiny_teacher))
    records = scorer.score(part).records
    assert [record.sample_id for record in records.tokens] == ["b#chosen", "b#rejected", "c"]
    check_pairs(records.tokens)
    reasons = {error.sample_id: error.reason for error in records.errors}
    assert set(reasons) == {"a#chosen", "a#rejected", "d#chosen"}
    assert "a#rejected has no record: turn 1 is an empty answer" in reasons["a#chosen"]
    assert "no such sample" in reasons["d#chosen"]
    for family in (records.response, records.sequence):
        assert family is not None
        assert len(family) == 3
    keys = {image.key for record in records.tokens for image in record.images}
    assert records.images is not None
    assert len(records.images) == 1
    for by_key in (records.visual, records.relation):
        assert by_key is not None
        assert set(by_key) == keys


def test_halves_with_different_prompts_are_both_errors(tmp_path: Path, tiny_teacher: Path) -> None:
    part = part_of(write_pairs(tmp_path, {"a": ("red", "blue")}))
    chosen, rejected = part.samples
    part = dataclasses.replace(part, samples=[chosen, dataclasses.replace(rejected, images=("blue.png",))])
    scorer = make_scorer(tiny_teacher, tmp_path, SignalRequest(), None)
    records: PartRecords = scorer.score(part).records
    assert records.tokens == []
    assert [type(error) for error in records.errors] == [SampleError, SampleError]
    assert all("prompt or images differ" in error.reason for error in records.errors)


def test_own_ids_that_look_like_halves_or_copies_are_ordinary_samples(tmp_path: Path, tiny_teacher: Path) -> None:
    """Both answers of each conversation count, and no sample looks for another."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    turns = [
        {"from": "human", "value": "<image>\nwhat colour?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "and on the right?"},
        {"from": "gpt", "value": "blue"},
    ]
    ids = ["plain", "a#chosen", "a#rejected", "x#chosen", "b~2"]
    rows = [{"id": name, "image": "red.png", "conversations": turns} for name in ids]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    scorer = make_scorer(tiny_teacher, tmp_path, SEQUENCE, reference_teacher(tiny_teacher))
    records = scorer.score(part_of(tmp_path / "rows.jsonl")).records
    assert not records.errors
    assert [record.sample_id for record in records.tokens] == ids
    assert len({record.num_response_tokens for record in records.tokens}) == 1
