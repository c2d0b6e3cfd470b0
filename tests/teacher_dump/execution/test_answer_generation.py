from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from storage.errors import StillhouseError
from storage.images.settings import PixelSettings
from storage.reader.cache import Cache
from storage.records.records import SampleError
from storage.verify.scan_cache import verify
from teacher_dump.config import SamplingSection, SourceSection
from teacher_dump.data.conversation import parse_conversation
from teacher_dump.data.dataset import SampleSet, read_samples
from teacher_dump.data.partition import Part
from teacher_dump.data.sample import Sample, SampleRefusedError, Turn
from teacher_dump.dump import run_dump
from teacher_dump.execution.worker_setup import list_prompt_errors
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.prompts.image_tokens import VisualGrid
from teacher_dump.prompts.preparation import Preparer
from teacher_dump.prompts.preprocessor import PromptBuilder
from teacher_dump.prompts.processor import load_processor
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.settings import read_settings
from teacher_dump.signals.lm_head import read_head
from teacher_dump.teachers import fingerprint
from teacher_dump.teachers.device_failure import PromptRefusedError
from teacher_dump.teachers.transformers_teacher import TransformersTeacher
from teacher_dump.workers.answerer import Answerer
from tests.teacher_dump.conftest import WriteConfig
from tests.teacher_dump.ray_head import RayHead

REPOSITORY = Path(__file__).parents[3]
SAMPLING = SamplingSection(temperature=1.0, max_new_tokens=24, seed=3)


@dataclass
class ScriptedTeacher:
    """A teacher that gives scripted answers and records its prompts."""

    script: list[list[int]]
    asked: list[list[int]] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)

    def generate(
        self,
        prompts: Sequence[TeacherPrompt],
        *,
        sampling: SamplingSection,
        seeds: Sequence[int],
        stop_ids: Sequence[int],
        vocab_size: int,
    ) -> list[list[int]]:
        self.asked += [prompt.token_ids.tolist() for prompt in prompts]
        self.num_images += [len(prompt.images) for prompt in prompts]
        return [self.script.pop(0) for _ in prompts]


def make_answerer(folder: Path, image_root: Path, generator: Any, sampling: SamplingSection = SAMPLING) -> Answerer:
    processor = load_processor(folder)
    facts = fingerprint.read_processor_facts(folder, processor)
    preparer = Preparer(
        prompts=PromptBuilder(processor, image_token_id=facts.image_token_id, eos_token_ids=facts.eos_token_ids),
        grid=VisualGrid(processor, facts.image_token_id),
        image_token_id=facts.image_token_id,
        preprocessing_fingerprint=facts.image_preprocessing_fingerprint,
        pixels=PixelSettings(),
        image_root=image_root,
        max_length=256,
    )
    return Answerer(
        preparer=preparer,
        generator=generator,
        tokenizer=processor.tokenizer,
        image_token_id=facts.image_token_id,
        eos_token_ids=facts.eos_token_ids,
        sampling=sampling,
        vocab_size=facts.vocab_size,
    )


def read_questions(file: Path, **fields: Any) -> Sequence[Sample]:
    source = SourceSection(path=str(file), **fields)
    return read_samples([source], extracted=file.parent / "extracted", only_questions=True).samples


def split_outcomes(outcomes: Sequence[Sample | SampleError]) -> tuple[list[Sample], list[SampleError]]:
    """Returns the answered samples, and the errors of the others."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, SampleError)]
    return [outcome for outcome in outcomes if isinstance(outcome, Sample)], errors


def test_each_answer_follows_the_questions_and_the_teachers_own_answers(tiny_teacher: Path, tiny_data: Path) -> None:
    tokenizer = load_processor(tiny_teacher).tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    spoken = {text: [*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in ("red", "blue", "white")}
    samples = read_questions(tiny_data, limit=4)
    script = [spoken["red"], spoken["blue"], [end], spoken["red"][:-1], spoken["white"], spoken["blue"]]
    teacher = ScriptedTeacher(script)
    got, errors = split_outcomes(make_answerer(tiny_teacher, tiny_data.parent, teacher).replace_answers(samples))
    assert [[turn.text for turn in sample.turns if turn.role == "assistant"] for sample in got] == [
        ["red", "white"],
        ["blue", "blue"],
    ]
    assert [error.sample_id for error in errors] == [samples[2].id, samples[3].id]
    assert "is empty" in errors[0].reason
    assert "does not end" in errors[1].reason
    questions = [turn.text.removeprefix("<image>\n") for turn in samples[0].turns if turn.role == "user"]
    opened = f"<|im_start|>user\n<image>\n{questions[0]}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(teacher.asked[0]) == opened
    later = f"{opened}red<|im_end|>\n<|im_start|>user\n{questions[1]}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(teacher.asked[4]) == later
    assert teacher.num_images == [1] * 6


class PickyTeacher(ScriptedTeacher):
    """A teacher that refuses every call that shows one of these images."""

    def __init__(self, refused: Sequence[bytes], script: list[list[int]], error: Exception) -> None:
        super().__init__(script)
        self.refused = refused
        self.error = error

    def generate(self, prompts: Sequence[TeacherPrompt], **options: Any) -> list[list[int]]:
        if any(image.tobytes() in self.refused for prompt in prompts for image in prompt.images):
            raise self.error
        return super().generate(prompts, **options)


def test_a_prompt_that_the_engine_refuses_costs_its_own_answer_only(tiny_teacher: Path, tiny_data: Path) -> None:
    tokenizer = load_processor(tiny_teacher).tokenizer
    spoken = [*tokenizer("red", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    samples = read_questions(tiny_data, limit=4)
    refused = get_pixels(tiny_data, samples[1])
    for error, reason in (
        (PromptRefusedError("At most 1 image(s)"), "the teacher refuses this sample: At most 1 image(s)"),
        (RuntimeError("no"), "the teacher failed: no"),
    ):
        picky = PickyTeacher([refused], [spoken] * 8, error)
        answerer = make_answerer(tiny_teacher, tiny_data.parent, picky)
        answered, errors = split_outcomes(answerer.replace_answers(samples))
        assert [sample.id for sample in answered] == [samples[at].id for at in (0, 2, 3)]
        assert errors == [SampleError(samples[1].id, reason)]


def get_pixels(file: Path, sample: Sample) -> bytes:
    with Image.open(file.parent / sample.images[0]) as image:
        return image.convert("RGB").tobytes()


def test_an_engine_that_answers_nothing_ends_the_answers(tiny_teacher: Path, tiny_data: Path) -> None:
    samples = read_questions(tiny_data, limit=4)
    for error in (RuntimeError("the weights are gone"), torch.AcceleratorError("CUDA error: the weights are gone")):
        picky = PickyTeacher([get_pixels(tiny_data, sample) for sample in samples], [], error)
        answerer = make_answerer(tiny_teacher, tiny_data.parent, picky)
        with pytest.raises((StillhouseError, torch.AcceleratorError), match="the weights are gone"):
            answerer.replace_answers(samples)


def test_generated_ids_win_over_their_text_in_every_later_prompt_and_on_disk(
    tiny_teacher: Path, tiny_data: Path
) -> None:
    tokenizer = load_processor(tiny_teacher).tokenizer
    begin, end, pad = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "red"]
    assert tokenizer("red", add_special_tokens=False)["input_ids"] != letters
    first, second = [*letters, begin, end], [pad, *letters, end]
    samples = read_questions(tiny_data, limit=1)
    teacher = ScriptedTeacher([first, second])
    answerer = make_answerer(tiny_teacher, tiny_data.parent, teacher)
    ((answered,), _) = split_outcomes(answerer.replace_answers(samples))
    assert [turn.text for turn in answered.turns[1::2]] == ["red<|im_start|>", "<|endoftext|>red"]
    at = len(teacher.asked[0])
    assert teacher.asked[1][: at + len(first)] == [*teacher.asked[0], *first]
    teacher.script += [first, second]
    (row,) = answerer.answer_part(Part(0, samples))
    (again,) = [Sample.from_json(json.loads(json.dumps(one.as_json()))) for one in [answered]]
    assert parse_conversation(row).turns == again.turns == answered.turns
    record = answerer.preparer.prepare(again).record
    assert record.token_ids[record.response_mask].tolist() == [*first, *second]
    assert record.token_ids[: len(teacher.asked[1])].tolist() == teacher.asked[1]


def test_answers_have_the_keys_of_their_questions(tmp_path: Path, tiny_teacher: Path, tiny_data: Path) -> None:
    end = load_processor(tiny_teacher).tokenizer.convert_tokens_to_ids("<|im_end|>")
    samples = read_questions(tiny_data, limit=2, weight=2)
    num_answers = sum(turn.role == "assistant" for sample in samples for turn in sample.turns)
    answerer = make_answerer(tiny_teacher, tiny_data.parent, ScriptedTeacher([[5, end]] * num_answers))
    rows = list(answerer.answer_part(Part(0, samples)))
    file = tmp_path / "split-0.jsonl"

    def read(rows: list[dict[str, Any]]) -> SampleSet:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_samples([SourceSection(path=str(file), images=str(tiny_data.parent))], extracted=tmp_path)

    assert [sample.key.copy for sample in samples] == [0, 1]
    assert [sample.key for sample in read(rows).samples] == [sample.key for sample in samples]
    for broken in ("x", ["x"], ["x", None, -1, 0], [None, None, 0, 0], ["x", None, "1", 0]):
        found = read([{**rows[0], "question_key": broken}])
        assert "question_key is" in found.errors[0].reason or "id is None" in found.errors[0].reason
        assert not found.samples


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 299, 298], "hold the image token <image>"),
        ([5, 310, 298], "reach 310; the tokenizer has 300 tokens"),
        ([-1, 298], "reach 298"),
        ([5, 6], "do not end with a stop token"),
        ([], "do not end with a stop token"),
    ],
)
def test_impossible_generated_ids_are_refused(
    tiny_teacher: Path, tiny_data: Path, ids: list[int], message: str
) -> None:
    (sample,) = read_questions(tiny_data, limit=1)
    broken = replace(sample, turns=(sample.turns[0], Turn("assistant", "red", token_ids=tuple(ids))))
    preparer = make_answerer(tiny_teacher, tiny_data.parent, ScriptedTeacher([])).preparer
    with pytest.raises(SampleRefusedError, match=message):
        preparer.prepare(broken)


def test_every_label_of_a_greedy_answer_is_the_teachers_first_choice(talker: Path, tiny_data: Path) -> None:
    samples = read_questions(tiny_data)
    teacher = TransformersTeacher(talker, dtype="float32", image_token_id=299, settings={})
    sampling = SamplingSection(temperature=0.0, max_new_tokens=48)
    answerer = make_answerer(talker, tiny_data.parent, teacher, sampling)
    answered, errors = split_outcomes(answerer.replace_answers(samples))
    assert answered
    assert all("the teacher's answer at turn" in error.reason for error in errors)
    prepared = [answerer.preparer.prepare(sample) for sample in answered]
    head = read_head(talker, vocab_size=300)  # without its padding, which is never said
    for one, states in zip(prepared, teacher.hidden_states([one.prompt for one in prepared]), strict=True):
        rows = torch.from_numpy(one.response_positions)
        first = (states.hidden[rows] @ head.weight.float().T).argmax(1)
        assert first.tolist() == one.record.token_ids[one.record.response_mask].tolist()


def test_ids_of_a_padded_head_are_never_generated(padded: Path, tiny_data: Path) -> None:
    """Without the mask many answers hold them: their rows are the largest."""
    samples = read_questions(tiny_data, limit=4)
    teacher = TransformersTeacher(padded, dtype="float32", image_token_id=299, settings={})
    for temperature in (0.0, 1.0):
        sampling = SamplingSection(temperature=temperature, max_new_tokens=12)
        answerer = make_answerer(padded, tiny_data.parent, teacher, sampling)
        prompts = [answerer._make_prompt(sample, 1) for sample in samples]
        said = teacher.generate(prompts, sampling=sampling, seeds=range(4), stop_ids=(298,), vocab_size=320)
        assert sum(max(ids) >= 300 for ids in said) >= 2, temperature
        said = teacher.generate(prompts, sampling=sampling, seeds=range(4), stop_ids=(298,), vocab_size=300)
        assert all(max(ids) < 300 for ids in said)


def test_questions_need_no_answer_and_pairs_are_refused(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}, {"from": "human", "value": "why?"}]
    rows = [
        {"id": "open", "conversations": turns},
        {"id": "whole", "conversations": turns[:2]},
        {"id": "vqa", "question": "what?"},
        {"id": "pair", "question": "what?", "chosen": "red", "rejected": "blue"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read_samples([SourceSection(path=str(path))], extracted=tmp_path, only_questions=True)
    assert [[turn.text for turn in sample.turns] for sample in found.samples] == [
        ["what?", "?", "why?", "?"],
        ["what?", "?"],
        ["what?", "?"],
    ]
    assert [error.sample_id for error in found.errors] == ["pair#chosen", "pair#rejected"]


@pytest.mark.ci
@pytest.mark.slow
def test_both_engines_give_the_same_greedy_answers_and_end_them_alike(
    write_config: WriteConfig, padded: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Of a teacher that would say ids of its padded head in many answers."""
    code = (
        "import sys; from teacher_dump.execution.answer_generation import answer_parts\n"
        "from teacher_dump.settings import read_settings\n"
        "for backend in ('transformers', 'vllm'):\n"
        "    overrides = [f'teacher.backend={backend}', f'runs_dir={sys.argv[2]}/{backend}']\n"
        "    settings = read_settings(sys.argv[1], overrides)\n"
        "    answer_parts(settings, stripe=0, num_stripes=1)"
    )
    data = {"sources": [{"path": str(tiny_data)}], "responses": "teacher", "sampling": {"max_new_tokens": 12}}
    config = write_config(data=data, teacher={"model": str(padded)}, dump={"samples_per_part": 12})
    command = [sys.executable, "-c", code, str(config), str(tmp_path / "both")]  # vLLM's own warnings are no errors
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = {
        backend: [
            json.loads(line)
            for path in sorted((tmp_path / "both" / backend).rglob("part-*.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        for backend in ("transformers", "vllm")
    }
    assert said["transformers"] == said["vllm"]
    refused = [row["refused"] for row in said["vllm"] if "refused" in row]
    assert not [reason for reason in refused if "which the tokenizer does not have" in reason]
    kinds = ["refused" in row for row in said["vllm"]]
    assert len(kinds) == 24
    assert any(kinds)
    assert not all(kinds)


def test_an_answer_depends_only_on_its_prompt_and_seed(talker: Path, tiny_data: Path) -> None:
    samples = read_questions(tiny_data, limit=6)
    teacher = TransformersTeacher(talker, dtype="float32", image_token_id=299, settings={})

    def said(samples: Sequence[Sample], seed: int) -> dict[str, list[str]]:
        sampling = SamplingSection(temperature=1.0, max_new_tokens=24, seed=seed)
        answerer = make_answerer(talker, tiny_data.parent, teacher, sampling)
        answered, _ = split_outcomes(answerer.replace_answers(samples))
        return {one.id: [turn.text for turn in one.turns] for one in answered}

    together = said(samples, 0)
    assert len(together) > 0
    assert together == said(samples[::-1], 0)
    assert together == {name: turns for sample in samples for name, turns in said([sample], 0).items()}
    assert together != said(samples, 1)


def test_a_dump_of_the_teachers_own_answers(
    ray_head: RayHead, write_config: WriteConfig, talker: Path, tiny_data: Path
) -> None:
    sampling = {"temperature": 1.0, "max_new_tokens": 24, "seed": 5}
    config = write_config(
        data={"sources": [{"path": str(tiny_data), "split": "own"}], "responses": "teacher", "sampling": sampling},
        teacher={"model": str(talker)},
        cache={"families": ["sequence"]},
        dump={"max_error_fraction": 0.95, "samples_per_part": 8},
    )
    settings = read_settings(config)
    before = plan_dump(settings)
    assert before.plan.num_samples == 24
    assert list_prompt_errors(settings, before, progress=False) == []
    command = [sys.executable, "-m", "teacher_dump", str(config)]  # Ray's own warnings are no errors there
    done = subprocess.run(
        command, cwd=REPOSITORY, env=ray_head.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cache = Cache.open(settings.cache.path)
    assert cache.num_samples > 0
    assert cache.num_samples + len(cache.errors) == 24
    assert cache.identity.selection["tokens"] == {
        "tokenisation": 2, "responses": "teacher", **sampling, "top_p": 1.0
    }  # fmt: skip
    assert verify(settings.cache.path).problems == []
    assert plan_dump(settings).identity.plan_fingerprint == cache.identity.plan_fingerprint
    assert all("the teacher's answer at turn" in error.reason for error in cache.errors)
    answers = {path: path.stat().st_mtime_ns for path in (settings.run / "answers").rglob("part-*.jsonl")}
    assert len(answers) == 4
    assert run_dump(settings, progress=False).summary is None
    assert answers == {path: path.stat().st_mtime_ns for path in (settings.run / "answers").rglob("part-*.jsonl")}
    tokenizer = load_processor(talker).tokenizer
    rows = [json.loads(line) for path in answers for line in path.read_text(encoding="utf-8").splitlines()]
    said = {row["id"]: row["messages"][1]["content"] for row in rows if "messages" in row}
    ids = {
        row["id"]: [one for message in row["messages"] for one in message.get("generated_token_ids", [])]
        for row in rows
        if "messages" in row
    }
    assert set(said) == set(cache.sample_ids)
    for number, sample_id in enumerate(cache.sample_ids):
        tokens = cache.read(number).tokens
        assert tokens.split == "own"
        assert tokens.token_ids[tokens.response_mask].tolist() == ids[sample_id]
        spoken = tokenizer.decode(tokens.token_ids[tokens.response_mask])
        assert spoken.startswith(f"{said[sample_id]}<|im_end|>")
