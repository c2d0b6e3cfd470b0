"""The evaluated turns of a conversation, and the held-out cross-entropy against a slow reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from storage.identity import stored_pixels
from storage.reader.cache import Cache
from storage.records.records import PartRecords, RelationMatrix
from storage.writer.cache_writer import CacheWriter
from student_train.config import EvaluationSection, SourceSection
from student_train.data.collate import collate
from student_train.data.sample_images import ImageFolder, TensorStore, VisionGatherer
from student_train.evaluation.model_evaluation import evaluate_model
from student_train.evaluation.relation_matrices import average_blocks, compute_relation_matrix
from student_train.losses.relation import compute_head_gram, relation_loss
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


@pytest.fixture(scope="module")
def document(cache: Path, checkpoint: Path) -> dict:
    """The evaluation of a student on a cache with all families."""
    section = EvaluationSection(splits=("test",), max_new_tokens=1, batch=5)
    found = evaluate_model(checkpoint, [SourceSection(path=str(cache))], section)
    (checkpoint / "evaluation.json").unlink()
    return found


def test_sums_of_the_samples_are_what_the_means_are_made_of(document: dict, cache: Path) -> None:
    opened, samples = Cache.open(cache, ()), document["fidelity_by_sample"]
    assert sorted(each["sample_id"] for each in samples) == sorted({each["sample_id"] for each in document["samples"]})
    for each in samples:
        num_rows = opened.read(opened.index_of(each["sample_id"])).tokens.num_response_tokens
        assert each["num_rows"] == each["num_labels"] == num_rows
    total = sum(each["num_rows"] for each in samples)
    assert document["kl_to_teacher"] == pytest.approx(sum(each["kl_sum"] for each in samples) / total, rel=1e-12)
    mean = sum(each["cross_entropy_sum"] for each in samples) / total
    assert document["cross_entropy"] == pytest.approx(mean, rel=1e-12)
    of_left = [each for each in samples if opened.read(opened.index_of(each["sample_id"])).tokens.category == "left"]
    kl = sum(each["kl_sum"] for each in of_left) / sum(each["num_rows"] for each in of_left)
    assert document["by_category"]["left"]["kl_to_teacher"] == pytest.approx(kl)


def test_sums_of_a_sample_do_not_depend_on_its_batch(document: dict, cache: Path, checkpoint: Path) -> None:
    section = EvaluationSection(splits=("test",), max_new_tokens=1, batch=1)  # one by one: no padding, no neighbours
    alone = evaluate_model(checkpoint, [SourceSection(path=str(cache))], section)
    (checkpoint / "evaluation.json").unlink()
    found = {each["sample_id"]: each for each in document["fidelity_by_sample"]}
    for each in alone["fidelity_by_sample"]:
        other = found[each.pop("sample_id")]
        assert {name: other[name] for name in each} == pytest.approx(each, rel=1e-4)


def test_a_cache_without_the_teacher_s_rows_gives_samples_no_kl(two_turns: Path, checkpoint: Path) -> None:
    section = EvaluationSection(splits=("train",), max_new_tokens=1)
    found = evaluate_model(checkpoint, [SourceSection(path=str(two_turns))], section)
    (checkpoint / "evaluation.json").unlink()
    assert [set(each) for each in found["fidelity_by_sample"]] == [{"sample_id", "num_labels", "cross_entropy_sum"}] * 3
    assert found["relations"] == []
    assert found["by_category"]["left"]["kl_to_teacher"] is None


def test_the_student_s_relation_matrices_are_those_of_its_loss(document: dict, cache: Path, checkpoint: Path) -> None:
    found = document["relations"]
    assert len({each["image"] for each in found}) == len(found) == 3
    opened, stored = read_checkpoint(checkpoint), Cache.open(cache)
    vision = VisionGatherer(
        ImageFolder(stored.image_root, opened.image_processor, pixels=stored_pixels(stored.identity)),
        features=TensorStore(1 << 20),
        pixels=TensorStore(0),
    )
    student = load_for_inference(opened, vocab_size=stored.identity.vocab_size)
    for each in found:
        matrix = np.array(each["matrix"])
        assert matrix.shape == (16, 16)
        assert np.linalg.norm(matrix) == pytest.approx(1, abs=1e-3)
        batch = collate(
            stored.read_many([stored.index_of(each["sample_id"])]), opened.sequence_format, vision.gather,
            families=("relation",),
        )  # fmt: skip
        assert batch.relation is not None
        with torch.inference_mode():
            hidden = student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
            rows = hidden[batch.visual_positions][None]
            gram = compute_head_gram(student.head.weight, vocab_size=student.vocab_size)
            loss = float(relation_loss(rows, gram, batch.relation[0]))
        assert each["cosine"] == pytest.approx(1 - loss, abs=1e-4)


def test_large_matrices_are_averaged_and_grids_that_do_not_fit_are_said_to_be() -> None:
    large = np.arange(36.0, dtype=np.float32).reshape(6, 6)
    assert average_blocks(large, 3).tolist() == large.reshape(3, 2, 3, 2).mean((1, 3)).tolist()
    assert average_blocks(large, 4).shape == (4, 4)  # blocks of one and two
    assert average_blocks(large, 6).tolist() == large.tolist()
    teacher = RelationMatrix(np.eye(4, dtype=np.float32) * np.float32(0.5), 1.0)
    with pytest.raises(ValueError, match="not a square grid"):
        compute_relation_matrix(torch.ones(5, 2), torch.ones(3, 2), teacher, centered=False)
    same = compute_relation_matrix(torch.ones(4, 2), torch.ones(3, 2), teacher, centered=False)
    assert same == pytest.approx(np.full((4, 4), 0.25))
    assert not compute_relation_matrix(torch.ones(4, 2), torch.ones(3, 2), teacher, centered=True).any()
