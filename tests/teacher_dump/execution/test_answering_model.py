"""Answers of another model than the teacher, such as a student: generated first, kept as ids, scored by the teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.errors import ConfigError, IdentityError
from storage.images.settings import PIXELS_FILE, PixelSettings
from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from teacher_dump.data.partition import make_plan
from teacher_dump.dump import run_dump
from teacher_dump.execution.answer_generation import answer_parts, generate_missing_answers, open_answerer
from teacher_dump.execution.machine import check_engine_gpus
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.answer_files import compute_answers_key, load_answered_settings, resolve_answers_folder
from teacher_dump.planning.dump_plan import plan_dump, plan_questions
from teacher_dump.settings import DumpSettings, read_settings
from teacher_dump.signals.lm_head import read_head
from teacher_dump.teachers.transformers_teacher import TransformersTeacher
from teacher_dump.workers.progress import count_error_kinds
from teacher_dump.workers.worker import Worker
from tests.teacher_dump.conftest import WriteConfig
from tests.teacher_dump.execution.test_answer_generation import split_outcomes
from tests.tiny import make_tiny_tokenizer

SAMPLING = {"temperature": 1.0, "max_new_tokens": 24, "seed": 5}


def read_answered_settings(
    write_config: WriteConfig, model: Path, overrides: Sequence[str] = (), **sections: dict[str, Any]
) -> DumpSettings:
    """Settings of a dump of a model's answers, over the tiny teacher, which is another model."""
    responses = {"model": str(model), "backend": "transformers"}
    document = {
        "data": {"responses": responses, "sampling": SAMPLING},
        "cache": {"families": ["sequence"]},
        "dump": {"max_error_fraction": 0.95, "samples_per_part": 8, "blind_check_samples": 0},
    }
    return read_settings(write_config(**{**document, **sections}), overrides)


def answer_questions(settings: DumpSettings) -> Path:
    """Generates all missing answers in this process; returns their folder."""
    questions = plan_questions(settings)
    answer_parts(settings, stripe=0, num_stripes=1)
    generate_missing_answers(settings, questions, progress=False)
    return resolve_answers_folder(settings, questions.identity)


def score_answers(settings: DumpSettings) -> None:
    """Writes the parts of the cache with a teacher in this process."""
    found = get_scoring_settings(settings)
    planned = plan_dump(settings)
    worker = Worker(make_worker_settings(planned, found))
    for part in planned.plan.parts:
        worker.run(part)


def get_scoring_settings(settings: DumpSettings) -> DumpSettings:
    """The settings that `run_dump` scores with: the answers are the data set."""
    found = load_answered_settings(settings, plan_questions(settings).identity)
    assert found is not None
    return found


def make_text_model(folder: Path) -> Path:
    """A random decoder with the tiny teacher's tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("part-*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def test_a_models_answers_are_kept_as_ids_and_scored_by_the_teacher(
    write_config: WriteConfig, talker: Path, tiny_teacher: Path
) -> None:
    settings = read_answered_settings(write_config, talker)
    questions = plan_questions(settings)
    rows = read_rows(answer_questions(settings))
    score_answers(settings)
    result = run_dump(settings, progress=False)  # every part exists: it seals, without Ray
    assert result.summary is None
    cache = Cache.open(settings.cache.path)
    assert cache.sealed
    assert verify(settings.cache.path).problems == []
    answered = {row["id"]: row for row in rows if "messages" in row}
    assert 0 < len(answered) < 24
    assert set(cache.sample_ids) == set(answered)
    assert len(cache.errors) == 24 - len(answered)

    # the ids are those that the model generates from the teacher's prompts
    model = TransformersTeacher(talker, dtype="float32", image_token_id=299, settings={})
    alone = replace(open_answerer(settings, questions), generator=model)
    samples = [sample for part in questions.plan.parts for sample in part.samples]
    expected = {sample.id: sample for sample in split_outcomes(list(alone.answer_samples(samples)))[0]}
    assert set(expected) == set(answered)
    teacher = TransformersTeacher(tiny_teacher, dtype="float32", image_token_id=299, settings={})
    head = read_head(tiny_teacher, vocab_size=300)
    for number, sample_id in enumerate(cache.sample_ids):
        record = cache.read(number)
        said = [one for turn in expected[sample_id].turns for one in turn.token_ids or ()]
        assert record.tokens.token_ids[record.tokens.response_mask].tolist() == said
        # and their logprobs are the teacher's
        prepared = alone.preparer.prepare(expected[sample_id])
        (states,) = teacher.hidden_states([prepared.prompt])
        logits = states.hidden[torch.from_numpy(prepared.response_positions)] @ head.weight.float().T
        assert record.sequence is not None
        of_said = logits.log_softmax(1)[torch.arange(len(said)), torch.tensor(said)]
        assert record.sequence.logprob == pytest.approx(float(of_said.sum()), abs=1e-3)

    tokens = cache.identity.selection["tokens"]
    assert {name: tokens[name] for name in (*SAMPLING, "top_p")} == {**SAMPLING, "top_p": 1.0}
    assert tokens["responses"]["dtype"] == "float32"
    assert tokens["responses"]["model"] != cache.identity.teacher_fingerprint
    again = read_answered_settings(write_config, talker, ["data.sampling.seed=6"])
    answer_questions(again)
    with pytest.raises(IdentityError, match="made with other settings"):
        run_dump(again, progress=False)


def test_sample_ids_and_part_boundaries_are_those_of_the_questions(write_config: WriteConfig, talker: Path) -> None:
    settings = read_answered_settings(write_config, talker)
    questions = plan_questions(settings)
    refused = {row["id"] for row in read_rows(answer_questions(settings)) if "refused" in row}
    assert refused
    plan = plan_dump(settings).plan
    expected = [[one.id for one in part.samples if one.id not in refused] for part in questions.plan.parts]
    assert [[one.id for one in part.samples] for part in plan.parts] == expected
    packed = make_plan([one for part in plan.parts for one in part.samples], samples_per_part=8, max_length=128)
    assert [[one.id for one in part.samples] for part in packed.parts] != expected  # a new split would differ


def test_a_part_whose_questions_have_no_answer_is_empty(
    write_config: WriteConfig, talker: Path, tiny_data: Path
) -> None:
    settings = read_answered_settings(write_config, talker)
    folder = answer_questions(settings)
    rows = [json.loads(line) for line in (folder / "part-00001.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {row["id"] for row in rows}
    lines = (folder / "split-0.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in map(json.loads, lines) if line["id"] not in names]
    refused = [{"id": name, "refused": "the model's answer at turn 1 is empty"} for name in names]
    (folder / "split-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*kept, *refused]))
    parts = plan_dump(settings).plan.parts
    assert len(parts[1].samples) == 0
    assert sum(len(part.samples) for part in parts) > 0
    score_answers(settings)
    run_dump(settings, progress=False)
    assert verify(settings.cache.path).problems == []
    assert Cache.open(settings.cache.path).num_parts == len(parts)


def test_answers_that_exist_are_not_generated_again(write_config: WriteConfig, talker: Path) -> None:
    settings = read_answered_settings(write_config, talker)
    answer_parts(settings, stripe=0, num_stripes=2)  # as a run that was killed between two parts
    folder = resolve_answers_folder(settings, plan_questions(settings).identity)
    first = {path: path.stat().st_mtime_ns for path in folder.glob("part-*.jsonl")}
    assert 0 < len(first) < len(plan_questions(settings).plan.parts)
    answer_questions(settings)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    whole = {path.name: path.read_bytes() for path in folder.glob("part-*.jsonl")}
    shutil.rmtree(folder)
    answer_questions(settings)
    assert {path.name: path.read_bytes() for path in folder.glob("part-*.jsonl")} == whole


def test_the_model_and_the_sampling_decide_which_answers_are_meant(
    write_config: WriteConfig, talker: Path, tiny_teacher: Path, padded: Path
) -> None:
    def key(model: Path, *overrides: str) -> str:
        settings = read_answered_settings(write_config, model, overrides)
        return compute_answers_key(plan_questions(settings).identity, settings.data.sampling)

    assert key(talker) == key(talker)
    assert key(talker, f"teacher.model={padded}") == key(talker)  # who scores them does not matter
    others = [
        key(padded),
        key(talker, "data.responses.dtype=bfloat16"),
        *(key(talker, f"data.sampling.{field}") for field in ("seed=1", "top_p=0.5", "temperature=0")),
        key(talker, "data.sampling.max_new_tokens=7"),
        key(talker, "data.responses=teacher"),
    ]
    assert len({key(talker), *others}) == 1 + len(others)


def test_unusable_answers_are_counted_by_kind(write_config: WriteConfig, talker: Path) -> None:
    class Scripted:
        """Gives one empty answer, one cut by max_new_tokens, one cut by the longest sequence, then good ones."""

        def __init__(self) -> None:
            self.script = [[298], [5] * 24, [5] * 7]

        def generate(self, prompts: Sequence[Any], **options: Any) -> list[list[int]]:
            return [self.script.pop(0) if self.script else [70, 298] for _ in prompts]

    settings = read_answered_settings(write_config, talker)
    questions = plan_questions(settings)
    answerer = replace(open_answerer(settings, questions), generator=Scripted())
    samples = [sample for part in questions.plan.parts for sample in part.samples]
    _, errors = split_outcomes(list(answerer.answer_samples(samples[:6])))
    assert [error.sample_id for error in errors] == [sample.id for sample in samples[:3]]
    kinds = count_error_kinds(errors)
    assert len(kinds) == 3
    for words in (
        "the model's answer at turn 1 is empty",
        "does not end within 24 tokens; data.sampling.max_new_tokens allows no more",
        "does not end within 7 tokens; teacher.max_length, or the model's own context",
    ):
        assert any(words in error.reason for error in errors), words


def test_a_model_that_cannot_answer_is_refused_by_name(write_config: WriteConfig, talker: Path, tmp_path: Path) -> None:
    def copy(name: str, *ignored: str) -> Path:
        return shutil.copytree(talker, tmp_path / name, ignore=shutil.ignore_patterns(*ignored))

    foreign = copy("foreign")
    make_tiny_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", "<image>")).save_pretrained(foreign)
    small = copy("small")
    config = json.loads((small / "config.json").read_bytes())
    config["text_config"]["vocab_size"] = 299
    (small / "config.json").write_text(json.dumps(config))
    elsewhere = copy("elsewhere")
    config["text_config"]["vocab_size"] = 320
    (elsewhere / "config.json").write_text(json.dumps({**config, "image_token_index": 295, "image_token_id": 295}))
    blind = make_text_model(tmp_path / "blind")
    dark = copy("dark")
    (dark / PIXELS_FILE).write_text(PixelSettings(background="#000000").model_dump_json())
    for folder, words in (
        (tmp_path / "missing", ["data.responses.model", "missing is not a folder", "give the folder of a checkpoint"]),
        (copy("bare", "config.json"), ["bare has no config.json"]),
        (copy("weightless", "*.safetensors"), ["data.responses.model", "weightless", "has no safetensors weights"]),
        (copy("mute", "tokenizer*", "*.jinja"), ["data.responses.model", "mute", "tokenizer cannot be loaded"]),
        (foreign, ["tokenizer_fingerprint", "foreign", "give a model with the teacher's tokenizer"]),
        (small, ["vocab_size: the teacher has 300", "the head of", "299 rows"]),
        (elsewhere, ["elsewhere sees images at token 295, the teacher at token 299"]),
        (blind, ["blind cannot see images", "samples of data.sources have some"]),
        (dark, ["dark, which is to answer, was trained with #000000", "set data.background"]),
    ):
        with pytest.raises(ConfigError) as caught:
            plan_dump(read_answered_settings(write_config, folder))
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.responses=studnet", ["data.responses", "'dataset' or 'teacher'", "AnsweringModelSection"]),
        ("data.responses={modle: x}", ["data.responses.modle", "unknown field", "did you mean model"]),
        ("data.responses={backend: vllm}", ["data.responses.model", "is missing"]),
        ("data.responses={model: x, backend: sglang}", ["data.responses.backend", "'vllm' or 'transformers'"]),
    ],
)
def test_a_misspelt_answering_model_is_explained(
    write_config: WriteConfig, talker: Path, override: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(write_config(), [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_settings_of_an_engine_that_has_none_are_refused(write_config: WriteConfig, talker: Path) -> None:
    settings = read_answered_settings(write_config, talker, ["data.responses.settings={max_num_seqs: 4}"])
    with pytest.raises(ConfigError, match=r"data\.responses\.settings: the transformers backend takes no max_num_seqs"):
        plan_dump(settings)


def test_a_text_only_model_may_answer_questions_without_images(
    write_config: WriteConfig, talker: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "one", "question": "what?", "answer": "red"}) + "\n")
    model = make_text_model(tmp_path / "model")
    settings = read_answered_settings(write_config, model, [f"data.sources=[{{path: {rows}}}]"])
    (row,) = read_rows(answer_questions(settings))
    assert "does not end within 24 tokens" in row.get("refused", "") or row["messages"]


def test_the_gpus_of_the_answering_engine_are_checked(write_config: WriteConfig, talker: Path) -> None:
    settings = read_answered_settings(
        write_config, talker, ["data.responses.settings={tensor_parallel_size: 4}", "dump.gpus_per_actor=64"]
    )
    with pytest.raises(ConfigError, match=r"dump\.gpus_per_actor asks for 64 GPUs"):
        check_engine_gpus(settings)
