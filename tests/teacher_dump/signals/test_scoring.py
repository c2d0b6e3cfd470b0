from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from storage.errors import StillhouseError
from storage.selection import TopK
from teacher_dump.data.partition import Part
from teacher_dump.data.sample import SampleRefusedError
from teacher_dump.prompts.processor import load_processor
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.signals.lm_head import read_head
from teacher_dump.signals.loaded_teacher import LoadedTeacher
from teacher_dump.signals.scoring import PartScorer
from teacher_dump.signals.spec import RowRequest
from teacher_dump.signals.teacher_noise import compute_rescored_kl
from teacher_dump.teachers.teacher import TeacherStates
from teacher_dump.teachers.transformers_teacher import TransformersTeacher
from tests.teacher_dump.scorers import EVERYTHING, NOTHING, make_scorer, part_of, reference_teacher


@pytest.fixture(scope="module")
def reference(tiny_teacher: Path) -> TransformersTeacher:
    return reference_teacher(tiny_teacher)


class ChangedTeacher:
    """A teacher whose states are changed by a function of the batch."""

    def __init__(self, teacher: TransformersTeacher, twist: Any) -> None:
        self._teacher = teacher
        self._twist = twist

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        return self._twist(prompts, self._teacher.hidden_states(prompts))


def test_signals_equal_a_plain_forward_pass_of_the_whole_model(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    """The model's own logits over its own processor's ids: nothing shifted, cut or expanded by us."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(tiny_teacher).eval()
    processor = load_processor(tiny_teacher)
    part = part_of(tiny_data, limit=10)
    scored = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, reference).score(part)
    records = scored.records
    assert records.response is not None
    assert records.visual is not None
    assert records.relation is not None
    num_tokens = 0
    for sample, tokens, rows in zip(part.samples, records.tokens, records.response, strict=True):
        image = Image.open(tiny_data.parent / sample.images[0]).convert("RGB")
        inputs = processor(images=[image], text=[processor.tokenizer.decode(tokens.token_ids)], return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits[0, :, :300]
        logprobs = torch.log_softmax(logits.double(), dim=-1).numpy()
        ids = inputs["input_ids"][0].numpy()
        num_tokens += len(ids)
        counts = np.where(tokens.token_ids == 299, 16, 1)
        is_response = np.repeat(tokens.response_mask, counts)
        predicting = np.flatnonzero(is_response) - 1
        labels = ids[predicting + 1]
        assert labels.tolist() == tokens.token_ids[tokens.response_mask].tolist()
        assert rows.label_logprob is not None
        np.testing.assert_allclose(rows.label_logprob, logprobs[predicting, labels], atol=1e-5)
        np.testing.assert_allclose(rows.logprobs.reshape(-1, 300), -np.sort(-logprobs[predicting], axis=1), atol=1e-5)
        (ref,) = tokens.images
        seen = np.flatnonzero(ids == 299)
        visual = records.visual[ref.key]
        assert visual.num_rows == ref.num_visual_tokens == len(seen) == 16
        head = np.exp(logprobs[seen]) * (np.exp(logprobs[seen]) >= 0.02)
        np.testing.assert_allclose(visual.tail_mass, 1 - head.sum(axis=1), atol=1e-5)
        raw = logits[seen].double().numpy()
        gram = raw @ raw.T
        np.testing.assert_allclose(records.relation[ref.key].values, gram / np.linalg.norm(gram), atol=1e-6)
    assert scored.num_tokens == num_tokens
    assert set(records.visual) == set(records.relation) == {ref.key for t in records.tokens for ref in t.images}
    assert len(records.visual) == 8


def test_tokens_are_the_same_without_a_teacher(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    part = part_of(tiny_data)
    alone = make_scorer(tiny_teacher, tiny_data.parent, NOTHING, None).score(part)
    asked = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, reference).score(part)
    assert alone.num_tokens == 0
    assert alone.records.response is None
    for one, other in zip(alone.records.tokens, asked.records.tokens, strict=True):
        assert (one.sample_id, one.images) == (other.sample_id, other.images)
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.response_mask.tolist() == other.response_mask.tolist()


def test_bad_samples_are_counted_and_cost_only_themselves(
    tmp_path: Path, tiny_teacher: Path, reference: TransformersTeacher
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")

    def row(name: str, image: str | None, question: str, answer: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": name, "image": image, "conversations": turns}

    rows = [
        row("good", "red.png", "<image>\nwhat?", "red"),
        row("broken", "broken.png", "<image>\nwhat?", "red"),
        row("silent", "red.png", "<image>\nwhat?", ""),
        row("long", "red.png", "<image>\n" + "what? " * 100, "red"),
        row("blank", None, "what?", "red"),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    records = make_scorer(tiny_teacher, tmp_path, EVERYTHING, reference, max_length=60).score(part_of(file)).records
    assert [tokens.sample_id for tokens in records.tokens] == ["good", "blank"]
    reasons = {error.sample_id: error.reason for error in records.errors}
    assert set(reasons) == {"broken", "silent", "long"}
    assert "cannot be decoded" in reasons["broken"]
    assert "empty answer" in reasons["silent"]
    assert "16 of them visual; teacher.max_length allows 60" in reasons["long"]
    assert records.response is not None
    assert len(records.response) == 2


def test_a_sample_that_the_engine_refuses_costs_only_itself(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    part = part_of(tiny_data, limit=6)
    builder = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, reference)
    hated = builder.score(Part(0, part.samples[2:3])).records.tokens[0].token_ids.tolist()

    def refuse(prompts: Sequence[TeacherPrompt], states: list[TeacherStates]) -> list[TeacherStates]:
        if any(prompt.token_ids.tolist() == hated for prompt in prompts):
            raise RuntimeError("I will not")
        return states

    def spoil(prompts: Sequence[TeacherPrompt], states: list[TeacherStates]) -> list[TeacherStates]:
        for prompt, state in zip(prompts, states, strict=True):
            if prompt.token_ids.tolist() == hated:
                state.hidden[3, 0] = float("inf")
        return states

    def expand_more(prompts: Sequence[TeacherPrompt], states: list[TeacherStates]) -> list[TeacherStates]:
        return [
            TeacherStates(np.insert(state.token_ids, 6, 299), state.hidden)
            if prompt.token_ids.tolist() == hated
            else state
            for prompt, state in zip(prompts, states, strict=True)
        ]

    for twist, reason in ((refuse, "I will not"), (spoil, "not finite"), (expand_more, "expands images in another")):
        scorer = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, ChangedTeacher(reference, twist))
        records = scorer.score(part).records
        assert len(records.tokens) == 6 - len(records.errors)
        assert part.samples[2].id in {error.sample_id for error in records.errors}
        assert all(reason in error.reason for error in records.errors)
        assert records.response is not None
        assert len(records.response) == len(records.tokens)


def test_an_engine_that_expands_every_image_otherwise_leaves_no_record_and_measures_nothing(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    def expand_more(prompts: Sequence[TeacherPrompt], states: list[TeacherStates]) -> list[TeacherStates]:
        return [TeacherStates(np.insert(state.token_ids, 6, 299), state.hidden) for state in states]

    scorer = make_scorer(tiny_teacher, tiny_data.parent, MEASURED, ChangedTeacher(reference, expand_more))
    records = scorer.score(part_of(tiny_data, limit=4)).records
    assert (len(records.tokens), len(records.errors)) == (0, 4)
    assert records.teacher_noise == {}
    assert "position 21: the engine has token 299, expected 198" in records.errors[0].reason


def test_an_engine_that_fails_on_everything_stops_the_dump(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    def refuse(prompts: Sequence[TeacherPrompt], states: list[TeacherStates]) -> list[TeacherStates]:
        raise RuntimeError("out of memory")

    scorer = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, ChangedTeacher(reference, refuse))
    with pytest.raises(StillhouseError, match=r"fails on every sample.*out of memory"):
        scorer.score(part_of(tiny_data, limit=4))


def test_an_images_rows_are_kept_once_for_each_prefix(
    tmp_path: Path, tiny_teacher: Path, reference: TransformersTeacher
) -> None:
    for name, colour in (("a", "red"), ("copy", "red"), ("b", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")

    def row(number: int, images: list[str], question: str) -> str:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
        return json.dumps({"id": str(number), "image": images, "conversations": turns}) + "\n"

    one, two = "<image>\nwhat?", "<image>\n<image>\nwhat?"
    rows = [
        (["a.png"], one), (["copy.png"], one + " now"), (["b.png"], one),
        (["a.png", "b.png"], two), (["b.png", "a.png"], two), (["a.png"], "what?\n<image>"),
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(row(number, *fields) for number, fields in enumerate(rows)), encoding="utf-8")
    records = make_scorer(tiny_teacher, tmp_path, EVERYTHING, reference).score(part_of(file)).records
    keys = [[ref.key for ref in tokens.images] for tokens in records.tokens]
    red, blue = keys[0][0], keys[2][0]
    assert keys[1] == [red]  # the same content in another file
    assert keys[3][0] == red  # the first image does not see the second
    assert keys[4][0] == blue
    assert len({red, blue, keys[3][1], keys[4][1], keys[5][0]}) == 5
    assert records.visual is not None
    assert len(records.visual) == 5


def test_hidden_rows_are_the_states_that_predict_the_response(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    request = dataclasses.replace(EVERYTHING, hidden_limit=65504.0, images=True)
    records = make_scorer(tiny_teacher, tiny_data.parent, request, reference).score(part_of(tiny_data, limit=6)).records
    assert records.response is not None
    assert records.hidden is not None
    assert records.images is not None
    head = read_head(tiny_teacher, vocab_size=300).stored()
    for rows, states in zip(records.response, records.hidden, strict=True):
        assert states.dtype == np.float32
        logits = head.logits(states)
        falling = -np.sort(-head.logprobs(states), axis=1)
        np.testing.assert_allclose(falling, rows.logprobs.reshape(-1, 300), atol=1e-4)
        best = rows.ids.reshape(-1, 300)[:, 0]
        assert logits.argmax(axis=1).tolist() == best.tolist()
    shown = {image.sha256: image.path for tokens in records.tokens for image in tokens.images}
    files = {sha256: (tiny_data.parent / path).read_bytes() for sha256, path in shown.items()}
    assert records.images == files


def test_a_hidden_state_that_float16_cannot_hold_costs_its_sample_only(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    part = part_of(tiny_data, limit=4)

    def grow(prompts: Sequence[TeacherPrompt], states: list[TeacherStates]) -> list[TeacherStates]:
        states[1].hidden[-3, 0] = 70000.0  # of a response row
        states[2].hidden[0, 0] = 70000.0  # of no response row
        return states

    teacher = ChangedTeacher(reference, grow)
    request = dataclasses.replace(NOTHING, hidden_limit=65504.0, images=True)
    records = make_scorer(tiny_teacher, tiny_data.parent, request, teacher).score(part).records
    assert [error.sample_id for error in records.errors] == [part.samples[1].id]
    assert "beyond 65504; cache.hidden.encoding int8" in records.errors[0].reason
    assert records.hidden is not None
    assert len(records.hidden) == len(records.tokens) == 3
    assert records.images is not None
    assert set(records.images) == {image.sha256 for tokens in records.tokens for image in tokens.images}
    endless = dataclasses.replace(request, hidden_limit=float("inf"))
    assert not make_scorer(tiny_teacher, tiny_data.parent, endless, teacher).score(part).records.errors


def test_images_alone_need_no_teacher(tiny_teacher: Path, tiny_data: Path) -> None:
    request = dataclasses.replace(NOTHING, images=True)
    records = make_scorer(tiny_teacher, tiny_data.parent, request, None).score(part_of(tiny_data)).records
    assert records.images is not None
    assert len(records.images) == 8
    assert records.hidden is None


def test_a_grid_that_cannot_be_pooled_is_a_sample_error(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    scorer = make_scorer(tiny_teacher, tiny_data.parent, dataclasses.replace(EVERYTHING, relation_pool=2), reference)
    prepared = scorer.prepare(part_of(tiny_data, limit=1).samples).ready[0]
    images = tuple(dataclasses.replace(image, num_visual_tokens=15) for image in prepared.record.images)
    oblong = dataclasses.replace(prepared, record=dataclasses.replace(prepared.record, images=images))
    with pytest.raises(SampleRefusedError, match="15 visual tokens are no square grid"):
        scorer._check_grids(oblong)


def test_an_answer_that_the_teacher_holds_impossible_is_an_error_of_its_sample(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    request = dataclasses.replace(EVERYTHING, visual=None, relation_centered=None)
    plain = make_scorer(tiny_teacher, tiny_data.parent, request, reference)
    part = part_of(tiny_data, limit=6)
    records = plain.score(part).records
    answers = [record.token_ids[record.response_mask].tolist() for record in records.tokens]
    token = next(token for token in answers[0] if not all(token in answer for answer in answers))
    with_it = {record.sample_id for record, answer in zip(records.tokens, answers, strict=True) if token in answer}
    head = read_head(tiny_teacher, vocab_size=300)
    bias = torch.zeros(300)
    bias[token] = -torch.inf
    suppressing = PartScorer(plain._preparer, request, LoadedTeacher(reference, dataclasses.replace(head, bias=bias)))
    got = suppressing.score(part).records
    assert {error.sample_id for error in got.errors} == with_it
    assert "of its answer the probability 0" in got.errors[0].reason
    assert {record.sample_id for record in got.tokens} == {record.sample_id for record in records.tokens} - with_it
    assert got.response is not None
    assert len(got.response) == len(got.tokens)


MEASURED = dataclasses.replace(EVERYTHING, measured_parts=frozenset({0}))


def test_a_measured_part_sums_the_tails_of_all_its_rows(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    request = dataclasses.replace(MEASURED, response=RowRequest(TopK(3), 0))
    part = part_of(tiny_data)
    records = make_scorer(tiny_teacher, tiny_data.parent, request, reference).score(part).records
    full = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, reference).score(part).records
    assert records.response is not None
    assert full.response is not None
    expected = np.zeros(300)
    for all_entries in full.response:  # its rows have every token, by falling probability: all but the first three
        for row in range(all_entries.num_rows):
            tail = slice(all_entries.offsets[row] + 3, all_entries.offsets[row + 1])
            np.add.at(expected, all_entries.ids[tail], np.exp(all_entries.logprobs[tail].astype(np.float64)))
    tail = records.tail_totals["response"]
    np.testing.assert_allclose(tail.total, expected, rtol=1e-4, atol=1e-8)
    assert tail.num_rows == sum(rows.num_rows for rows in records.response)
    assert records.visual is not None
    masses = [float(rows.tail_mass.sum()) for rows in records.visual.values()]
    assert records.tail_totals["visual"].total.sum() == pytest.approx(sum(masses), rel=1e-5)
    assert full.tail_totals == full.teacher_noise == {}


def test_a_teacher_that_repeats_itself_has_no_noise_and_one_that_does_not_has_some(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher
) -> None:
    def shaken(prompts: Sequence[TeacherPrompt], states: list[TeacherStates]) -> list[TeacherStates]:
        scale = 1 + 1e-2 * len(prompts)  # depends on the batch, as kernels do
        return [TeacherStates(state.token_ids, state.hidden * scale) for state in states]

    part = part_of(tiny_data)
    log_output = make_scorer(tiny_teacher, tiny_data.parent, MEASURED, reference).score(part).records
    assert set(log_output.teacher_noise) == {"response", "visual"}
    assert max(log_output.teacher_noise["response"]) <= 1e-7
    assert log_output.response is not None
    assert len(log_output.teacher_noise["response"]) == min(sum(rows.num_rows for rows in log_output.response[:2]), 32)
    noisy = make_scorer(tiny_teacher, tiny_data.parent, MEASURED, ChangedTeacher(reference, shaken)).score(part).records
    assert min(noisy.teacher_noise["response"]) > 1e-5
    assert min(noisy.teacher_noise["visual"]) > 0


def test_noise_is_the_divergence_of_the_two_rows(tiny_teacher: Path) -> None:
    head = read_head(tiny_teacher, vocab_size=300)
    first, second = (torch.randn(300, head.weight.shape[1], generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    got = compute_rescored_kl(head, first, second)
    spread = [number * 300 // 32 for number in range(32)]
    p, q = (torch.log_softmax(head.logits(states[spread]).double(), dim=1) for states in (first, second))
    np.testing.assert_allclose(got, (p.exp() * (p - q)).sum(dim=1), rtol=1e-6, atol=1e-7)
    assert compute_rescored_kl(head, first, first) == [0.0] * 32
    assert compute_rescored_kl(head, first[:5], first[:5]) == [0.0] * 5
