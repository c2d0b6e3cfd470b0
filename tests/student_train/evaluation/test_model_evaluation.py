"""The evaluated turns of a conversation, and the held-out cross-entropy against a slow reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from storage.identity import stored_pixels
from storage.reader.cache import Cache
from storage.records.records import PartRecords
from storage.writer.cache_writer import CacheWriter
from student_train.config import EvaluationSection, SourceSection
from student_train.data.collate import collate
from student_train.data.sample_images import ImageFolder, TensorStore, VisionGatherer
from student_train.evaluation.model_evaluation import evaluate_model
from student_train.models.loading import load_for_inference, read_checkpoint
from tests.student_train.caches import make_cache


@pytest.fixture(scope="module")
def two_turns(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A cache of three samples with a second question about the same image, and its answer; tokens only."""
    one = Cache.open(make_cache(tmp_path_factory.mktemp("one"), checkpoint, num_samples=3, families=()))
    path = tmp_path_factory.mktemp("two") / "cache"
    writer = CacheWriter.open(path, one.identity.model_copy(update={"num_parts": 1}), ())
    records = []
    for index in range(3):
        tokens, other = one.read(index).tokens, one.read((index + 1) % 3).tokens
        asks_again = other.token_ids != one.identity.image_token_id
        records.append(
            replace(
                tokens,
                token_ids=np.concatenate([tokens.token_ids, other.token_ids[asks_again]]),
                response_mask=np.concatenate([tokens.response_mask, other.response_mask[asks_again]]),
            )
        )
    writer.write_part(0, PartRecords(tokens=records))
    writer.seal()
    return path


@pytest.mark.parametrize(("turns", "judged"), [("all", [0, 1]), ("first", [0]), ("last", [1])])
def test_the_requested_turns_are_evaluated_and_named(two_turns, checkpoint, turns, judged):
    section = EvaluationSection(splits=("train",), max_new_tokens=1, turns=turns)
    document = evaluate_model(checkpoint, [SourceSection(path=str(two_turns))], section)
    assert document["turns"] == turns
    assert (document["num_samples"], document["num_answers"]) == (3, 3 * len(judged))
    assert [sample["turn"] for sample in document["samples"]] == judged * 3
    references = {(sample["sample_id"], sample["turn"]): sample["reference"] for sample in document["samples"]}
    if turns == "all":  # each sample's second answer is the first one of the sample after it
        ids = sorted({sample_id for sample_id, _ in references})
        assert [references[name, 1] for name in ids] == [references[name, 0] for name in (*ids[1:], ids[0])]
    (checkpoint / "evaluation.json").unlink()


def test_held_out_cross_entropy_covers_every_reference_token(two_turns, checkpoint):
    document = evaluate_model(
        checkpoint, [SourceSection(path=str(two_turns))], EvaluationSection(splits=("train",), max_new_tokens=1)
    )
    (checkpoint / "evaluation.json").unlink()
    cache, opened = Cache.open(two_turns), read_checkpoint(checkpoint)
    folder = ImageFolder(cache.image_root, opened.image_processor, pixels=stored_pixels(cache.identity))
    vision = VisionGatherer(folder, features=TensorStore(1 << 20), pixels=TensorStore(0))
    student = load_for_inference(opened, vocab_size=cache.identity.vocab_size)
    surprises = []
    for index in range(3):  # one by one: no padding
        batch = collate(cache.read_many([index]), opened.sequence_format, vision.gather)
        with torch.inference_mode():
            hidden = student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
            logprobs = student.compute_logits(hidden[batch.response_positions]).double().log_softmax(1)
        surprises += (-logprobs[torch.arange(len(batch.labels)), batch.labels]).tolist()
    assert len(surprises) == sum(cache.read(index).tokens.num_response_tokens for index in range(3))
    assert document["cross_entropy"] == pytest.approx(np.mean(surprises), rel=1e-4)
