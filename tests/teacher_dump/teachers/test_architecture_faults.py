"""What a comparison of two teachers must be able to see: the image, the right row, the right norm, DeepStack.

The tiny checkpoints are random: without these tests a comparison could pass because nothing in them matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from storage.records.records import PartRecords
from teacher_dump.prompts.preparation import PreparedSample
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.signals.lm_head import OutputHead, read_head
from teacher_dump.teachers.teacher import TeacherStates
from teacher_dump.teachers.transformers_teacher import TransformersTeacher
from tests.teacher_dump.architectures import make_architecture_scorer, samples_of, write_samples
from tests.tiny_architectures import ARCHITECTURES, TEXT_ONLY, make_teacher
from tests.tiny_parts import VOCAB_SIZE

SEEING = [name for name in ARCHITECTURES if name not in TEXT_ONLY]
DEEPSTACK = [name for name in SEEING if name.startswith("qwen3_vl")]
LEAST_CHANGE = 0.1  # nats, of an answer, where another picture is shown
LEAST_FAULT = 0.01  # of a logprob or an entropy; the comparisons' tolerance is 200 times smaller


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny teacher in transformers, and its samples."""

    folder: Path
    engine: TransformersTeacher
    head: OutputHead
    ready: dict[str, PreparedSample]

    def score(self, engine: Any) -> PartRecords:
        records = make_architecture_scorer(self.folder, engine).score(samples_of(self.folder)).records
        assert not records.errors
        return records

    def compute_logprobs(self, sample_id: str) -> Tensor:
        sample = self.ready[sample_id]
        (states,) = self.engine.hidden_states([sample.prompt])
        return torch.log_softmax(self.head.logits(states.hidden[sample.response_positions]).double(), dim=-1)


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Returns cases by architecture, each made once."""
    root, made = tmp_path_factory.mktemp("faults"), {}

    def case(name: str) -> Case:
        if name not in made:
            folder = root / name
            make_teacher(folder / "teacher", name)
            write_samples(folder, with_images=name not in TEXT_ONLY)
            image_token_id = -1 if name in TEXT_ONLY else VOCAB_SIZE - 1
            engine = TransformersTeacher(
                folder / "teacher", dtype="float32", image_token_id=image_token_id, settings={}
            )
            ready = make_architecture_scorer(folder, engine).prepare(samples_of(folder).samples).ready
            head = read_head(folder / "teacher", vocab_size=VOCAB_SIZE)
            made[name] = Case(folder, engine, head, {sample.record.sample_id: sample for sample in ready})
        return made[name]

    return case


class ChangedTeacher:
    """A teacher whose hidden states are changed on their way out."""

    def __init__(self, teacher: TransformersTeacher, change: Callable[[Tensor], Tensor]) -> None:
        self._teacher = teacher
        self._change = change

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        states = self._teacher.hidden_states(prompts)
        return [TeacherStates(one.token_ids, self._change(one.hidden)) for one in states]


@pytest.mark.parametrize("architecture", SEEING)
def test_another_picture_changes_an_answer(architecture: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(architecture)
    shown, other = case.compute_logprobs("square"), case.compute_logprobs("other")  # the same ids
    change = (shown.exp() * (shown - other)).sum(dim=-1).mean()
    assert float(change) >= LEAST_CHANGE


def measure_faults(ours: PartRecords, theirs: PartRecords) -> dict[str, float]:
    """Returns the largest difference of a label's logprob, of a visual row's entropy and of a relation matrix."""
    labels = [
        np.abs(one.label_logprob - other.label_logprob).max()
        for one, other in zip(ours.response or [], theirs.response or [], strict=True)
        if one.label_logprob is not None and other.label_logprob is not None
    ]
    visual, relation = theirs.visual or {}, theirs.relation or {}
    entropies = [np.abs(rows.entropy - visual[key].entropy).max() for key, rows in (ours.visual or {}).items()]
    relations = [np.abs(one.values - relation[key].values).max() for key, one in (ours.relation or {}).items()]
    found = {"response": max(labels)}
    return found | ({"visual": max(entropies), "relation": max(relations)} if entropies else {})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shift_by_one_row_is_seen_in_every_family(architecture: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(architecture)
    shifted = ChangedTeacher(case.engine, lambda hidden: hidden.roll(1, dims=0))
    faults = measure_faults(case.score(shifted), case.score(case.engine))
    assert len(faults) == (1 if architecture in TEXT_ONLY else 3)
    assert min(faults.values()) > LEAST_FAULT, faults


def find_last_norm(model: Any) -> Any:
    decoder = model.get_decoder()
    return getattr(decoder, "model", decoder).norm  # Llama 4's decoder has its head as well


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_those_after_the_last_norm(architecture: str, case_of: Callable[[str], Case]) -> None:
    """Those that the head reads in the model itself; the states before the norm are seen as wrong."""
    case = case_of(architecture)
    model: Any = case.engine._model
    sample = next(iter(case.ready.values()))
    read: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            read[f"{name}.input"], read[f"{name}.output"] = inputs[0][0], output[0]

        return hook

    hooks = [
        find_last_norm(model).register_forward_hook(keep("norm")),
        model.get_output_embeddings().register_forward_hook(keep("head")),
    ]
    try:
        with torch.no_grad():
            logits = model(**case.engine._make_inputs(sample.prompt), use_cache=False).logits[0, :, :VOCAB_SIZE]
    finally:
        for hook in hooks:
            hook.remove()
    (states,) = case.engine.hidden_states([sample.prompt])
    torch.testing.assert_close(states.hidden, read["norm.output"], rtol=0, atol=1e-5)
    torch.testing.assert_close(states.hidden, read["head.input"], rtol=0, atol=1e-5)
    rows = sample.response_positions
    torch.testing.assert_close(case.head.logits(states.hidden[rows]), logits[rows], rtol=1e-4, atol=1e-4)
    wrong = case.head.logits(read["norm.input"][rows]).log_softmax(dim=-1)
    assert float((wrong - logits[rows].log_softmax(dim=-1)).abs().max()) > LEAST_FAULT


@pytest.mark.parametrize("architecture", DEEPSTACK)
def test_dropped_deepstack_features_are_seen(architecture: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(architecture)
    right = case.score(case.engine)
    engine = TransformersTeacher(case.folder / "teacher", dtype="float32", image_token_id=VOCAB_SIZE - 1, settings={})
    engine._model.model.visual.deepstack_visual_indexes = []
    faults = measure_faults(case.score(engine), right)
    assert min(faults.values()) > LEAST_FAULT, faults


@pytest.mark.parametrize("architecture", ["gemma3", "gemma4"])
def test_tokens_of_an_image_see_each_other(architecture: str, case_of: Callable[[str], Case]) -> None:
    """The model is told which tokens are an image's; without that its states are wrong from the image on."""
    case = case_of(architecture)
    sample = case.ready["square"]
    inputs = case.engine._make_inputs(sample.prompt)
    untold = {name: value for name, value in inputs.items() if "token_type_ids" not in name}
    assert len(untold) == len(inputs) - 1
    with torch.no_grad():
        wrong = case.engine._trunk(**untold, use_cache=False).last_hidden_state[0]
    (states,) = case.engine.hidden_states([sample.prompt])
    (seen,) = sample.expansion.visual
    change = (states.hidden - wrong).abs().amax(dim=-1)
    assert float(change[: seen[0]].max()) < 1e-4
    assert float(change[seen[0]]) > LEAST_FAULT  # the image's first token sees the others
