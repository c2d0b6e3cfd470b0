"""Dumps end to end by the command line, with Ray and the transformers teacher, compared with the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from storage.reader.cache import Cache
from storage.records.records import TokensRecord
from storage.verify.scan_cache import verify
from teacher_dump.__main__ import main
from teacher_dump.prompts.processor import load_processor
from tests.teacher_dump.conftest import WriteConfig
from tests.teacher_dump.ray_head import RayHead
from tests.teacher_dump.ray_jobs.test_part_pool import PATIENCE_S, commits, dump_here, start_dump
from tests.tiny import END_OF_TURN, make_tiny_dataset

VOCAB_SIZE = 300


def run_dump(config: Path, *, ray: RayHead) -> str:
    """Runs a dump that succeeds, and returns its output."""
    dump = start_dump(config, environment=ray.environment)
    said, complained = dump.communicate(timeout=PATIENCE_S)
    assert dump.returncode == 0, complained
    assert "Traceback" not in complained
    return said


class Model:
    """A checkpoint as transformers runs it, one conversation at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlavaForConditionalGeneration

        self.processor = load_processor(folder)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()

    def inputs(self, text: str, image: Path) -> Any:
        return self.processor(images=[Image.open(image)], text=[text], return_tensors="pt")

    @torch.inference_mode()
    def answer_logprobs(self, record: TokensRecord, image: Path) -> np.ndarray:
        """(r, v) before each response token, of a record with one image."""
        image_id = self.model.config.image_token_id
        expanded = np.repeat(record.token_ids, np.where(record.token_ids == image_id, 16, 1)).astype(np.int64)
        pixels = self.inputs(self.processor.tokenizer.decode([image_id]), image)["pixel_values"]
        assert len(expanded) == len(record.token_ids) + 15  # an image is 16 positions
        ids = torch.from_numpy(expanded)[None]
        logprobs = self.model(input_ids=ids, pixel_values=pixels).logits[0, :, :VOCAB_SIZE].double().log_softmax(dim=-1)
        before = np.flatnonzero(record.response_mask) + 14  # the image comes before every answer
        return logprobs[torch.from_numpy(before)].numpy()

    @torch.inference_mode()
    def generate(self, ids: list[int], image: Path, *, max_new_tokens: int) -> list[int] | None:
        """The most probable answer to a prompt, its stop token last.

        None if it does not end, is empty or holds what no answer may hold.
        """
        image_id, end = self.model.config.image_token_id, self.processor.tokenizer.eos_token_id
        expanded = [each for one in ids for each in ([one] * 16 if one == image_id else [one])]
        pixels = self.inputs(self.processor.tokenizer.decode([image_id]), image)["pixel_values"]
        prompt = {"input_ids": torch.tensor([expanded]), "attention_mask": torch.ones(1, len(expanded)).long()}
        padding = range(len(self.processor.tokenizer), self.model.config.text_config.vocab_size)
        found = self.model.generate(
            **prompt, pixel_values=pixels, do_sample=False, max_new_tokens=max_new_tokens, suppress_tokens=[*padding]
        )[0]
        said = found[len(expanded) :].tolist()
        if end not in said or image_id in said:
            return None
        answer = said[: said.index(end) + 1]
        return answer if self.processor.tokenizer.decode(answer[:-1]).strip() else None

    def make_prompt_ids(self, messages: list[dict[str, Any]], after: str = "") -> list[int]:
        """Of the rendered conversation up to the next answer, or of what it adds after a text."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return self.processor.tokenizer(text.rpartition(after)[2] if after else text, add_special_tokens=False)[
            "input_ids"
        ]


@pytest.mark.ci
@pytest.mark.slow
def test_a_dump_by_a_budget_is_a_dump_of_what_the_budget_has_chosen(
    ray_head: RayHead, write_config: WriteConfig, tiny_teacher: Path, tiny_data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With three sets of draws a row; the tail profile is the mean of what the model puts outside the exact entries."""
    budget = {"gradient_error": 0.3, "rows": 256, "samples": 8}
    config = write_config(cache={"families": ["response"], "budget": budget, "response": {"draw_sets": 3}})
    run_dump(config, ray=ray_head)
    assert verify(tmp_path / "cache").problems == []
    cache = Cache.open(tmp_path / "cache")
    chosen = cache.identity.selection["response"]
    predicted = chosen["budget"].pop("predicted")
    assert chosen["budget"] == {"gradient_error": 0.3, "rows": 256, "samples": 8}
    assert 0 < predicted["gradient_error"] <= 0.3
    by_hand = [f"cache.response.{name}={chosen[name]!r}" for name in ("tau", "rounding_kl")]
    dump_here(config, tmp_path / "by hand", "cache.budget=null", *by_hand)
    assert commits(tmp_path / "cache") == commits(tmp_path / "by hand")

    model, tails, num_drawn = Model(tiny_teacher), [], 0
    for index in range(cache.num_samples):
        record = cache.read(index)
        p = np.exp(model.answer_logprobs(record.tokens, tiny_data.parent / record.tokens.images[0].path))
        sets = [cache.read(index, draw_set=number).response for number in range(4)]
        first = sets[0]
        assert first is not None
        is_exact, row = first.is_exact(), first.row_of_entry()
        assert np.exp(first.logprobs[is_exact]) == pytest.approx(p[row[is_exact], first.ids[is_exact]], abs=0.05)
        assert (p[row[is_exact], first.ids[is_exact]] >= chosen["tau"] * (1 - 1e-4)).all()
        p[row[is_exact], first.ids[is_exact]] = 0
        assert p.max() <= chosen["tau"] * (1 + 1e-4)
        tails.append(p)
        for other in sets[1:]:
            assert other is not None
            exact = other.is_exact()
            assert other.ids[exact].tolist() == first.ids[is_exact].tolist()
            assert np.bincount(other.row_of_entry()[exact], minlength=len(p)).tolist() == first.num_exact.tolist()
        assert sets[3] is not None
        assert sets[3].equals(first)
        num_drawn += len({tuple(one.ids.tolist()) for one in sets if one is not None}) == 3
    assert num_drawn > cache.num_samples / 2  # the sets differ
    tail = np.concatenate(tails).sum(axis=0)
    expected = tail / tail.sum()
    assert np.abs(cache.tail_profile("response") - expected).sum() < 0.05  # a byte a token: within 4.4 %

    assert main([str(config)]) == 0
    assert "nothing; the cache was complete" in capsys.readouterr().out
    assert main([str(config), "cache.budget.gradient_error=0.2"]) == 2
    assert "selection.response.budget" in capsys.readouterr().err


def test_the_teachers_own_answers_are_those_of_generate_and_are_scored(
    ray_head: RayHead, write_config: WriteConfig, talker: Path, tmp_path: Path
) -> None:
    """Two turns a sample, each answered after the teacher's own earlier answer; what does not end is an error."""
    file = make_tiny_dataset(tmp_path / "data", num_samples=12, num_images=12, turns=2)["train"]
    config = write_config(
        data={"sources": [{"path": str(file)}], "responses": "teacher", "sampling": {"max_new_tokens": 24}},
        teacher={"model": str(talker), "max_length": 256},
        cache={"families": ["sequence"]},
        dump={"max_error_fraction": 0.99},
    )
    run_dump(config, ray=ray_head)
    model, expected = Model(talker), {}
    for line in file.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        messages: list[dict[str, Any]] = []
        ids, answers = [], []
        for number, asked in enumerate(sample["conversations"][::2]):
            image = [{"type": "image"}] if number == 0 else []
            text = {"type": "text", "text": asked["value"].removeprefix("<image>\n")}
            messages.append({"role": "user", "content": [*image, text]})
            ids = [*ids, *model.make_prompt_ids(messages, after="@@@" + END_OF_TURN if number else "")]
            answer = model.generate(ids, tmp_path / "data" / sample["image"], max_new_tokens=24)
            if answer is None:
                break
            answers.append(answer)
            ids = [*ids, *answer]  # a random model's ids are seldom those of their text
            messages.append({"role": "assistant", "content": [{"type": "text", "text": "@@@"}]})
        else:
            expected[sample["id"]] = answers
    assert len(expected) > 0

    cache = Cache.open(tmp_path / "cache")
    assert verify(tmp_path / "cache").problems == []
    assert set(cache.sample_ids) == set(expected), cache.errors
    assert len(cache.errors) == 12 - len(expected)
    reasons = ("does not end within", "is empty", "which the tokenizer does not have", "its own image token")
    assert all(any(reason in error.reason for reason in reasons) for error in cache.errors), cache.errors
    assert cache.identity.selection["tokens"]["responses"] == "teacher"
    for index, name in enumerate(cache.sample_ids):
        record = cache.read(index)
        tokens, sequence = record.tokens, record.sequence
        assert tokens.token_ids[tokens.response_mask].tolist() == [one for answer in expected[name] for one in answer]
        logprobs = model.answer_logprobs(tokens, tmp_path / "data" / tokens.images[0].path)
        labels = tokens.token_ids[tokens.response_mask]
        assert sequence is not None
        assert sequence.num_tokens == len(labels)
        assert sequence.logprob == pytest.approx(float(logprobs[np.arange(len(labels)), labels].sum()), abs=1e-3)
