from __future__ import annotations

from pathlib import Path

import pytest
import torch

from storage.images.settings import PixelSettings
from storage.reader.cache import Cache
from storage.records.sample_batch import SampleBatch
from student_train.data.collate import Batch, collate, collate_prompts, cut_prompt
from student_train.data.sample_images import ImageFolder, TensorStore, VisionGatherer
from student_train.evaluation.generation import generate_greedily
from student_train.models.loading import Checkpoint, load_for_inference, read_checkpoint
from student_train.models.student import Student, compute_tower_features


@pytest.fixture(scope="module")
def description(checkpoint: Path) -> Checkpoint:
    return read_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def samples(cache: Path) -> Cache:
    return Cache.open(cache)


def source(description: Checkpoint, samples: Cache, features: TensorStore | None = None) -> VisionGatherer:
    folder = ImageFolder(samples.identity.image_root, description.image_processor, pixels=PixelSettings())
    return VisionGatherer(folder, features=features, pixels=TensorStore(0))


def load(description: Checkpoint, features: TensorStore | None = None) -> Student:
    return load_for_inference(description, vocab_size=300, features=features)


def batch_of(description: Checkpoint, samples: Cache, indices: list[int], vision: VisionGatherer) -> Batch:
    return collate(samples.read_many(indices), description.sequence_format, vision.gather)


@torch.no_grad()
def test_hidden_states_and_head_are_those_of_the_whole_model(description: Checkpoint, samples: Cache) -> None:
    student = load(description)
    batch = batch_of(description, samples, [0, 2, 4], source(description, samples))
    hidden = student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
    logits = student.compute_logits(hidden).view(*batch.input_ids.shape, -1)
    for row, index in enumerate([0, 2, 4]):
        length = int((batch.input_ids[row] != description.sequence_format.pad_token_id).sum())
        alone = student.model(
            input_ids=batch.input_ids[row : row + 1, :length],
            pixel_values=batch.vision.pixel_values[row : row + 1],  # type: ignore[index]
        ).logits[0, :, :300]
        torch.testing.assert_close(logits[row, :length], alone, rtol=1e-4, atol=1e-4)
        assert samples.read(index).tokens.num_response_tokens > 0


@torch.no_grad()
def test_tower_features_are_what_the_model_projects(description: Checkpoint, samples: Cache) -> None:
    student = load(description)
    pixels = batch_of(description, samples, [0, 1], source(description, samples)).vision.pixel_values
    assert pixels is not None
    ours = student.model.model.multi_modal_projector(compute_tower_features(student.model, pixels))
    config = student.model.config
    theirs = student.model.get_image_features(
        pixels,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    ).pooler_output
    torch.testing.assert_close(ours, torch.stack(list(theirs)), rtol=0, atol=0)


@torch.no_grad()
def test_kept_features_do_not_change_the_result(description: Checkpoint, samples: Cache) -> None:
    features = TensorStore(1 << 20)
    student = load(description, features)
    vision = source(description, samples, features)
    first = batch_of(description, samples, [0, 1, 2], vision)
    fresh = student.compute_hidden(first.input_ids, first.visual_positions, first.vision)
    again = batch_of(description, samples, [0, 1, 2], vision)
    assert again.vision.pixel_values is None
    mixed = batch_of(description, samples, [0, 1, 2, 5], vision)
    assert mixed.vision.pixel_slots.tolist() == [3]
    torch.testing.assert_close(student.compute_hidden(again.input_ids, again.visual_positions, again.vision), fresh)
    length = mixed.input_ids.shape[1]
    hidden = student.compute_hidden(mixed.input_ids, mixed.visual_positions, mixed.vision).view(4, length, -1)
    expected = fresh.view(3, first.input_ids.shape[1], -1)
    shared = min(length, expected.shape[1])
    torch.testing.assert_close(hidden[:3, :shared], expected[:, :shared], rtol=1e-5, atol=1e-5)


def test_greedy_batches_agree_with_one_prompt_at_a_time(description: Checkpoint, samples: Cache) -> None:
    """The reference is transformers' own generate, with its head cut to the real vocabulary."""
    student = load(description)
    with torch.no_grad():
        student.model.lm_head.weight[300:] = 0
        student.model.lm_head.weight[:300, 0] += 1
    prompts = [
        cut_prompt(samples.read(index).tokens, image_token_id=samples.identity.image_token_id) for index in range(5)
    ]
    eos = samples.identity.eos_token_ids
    vision = source(description, samples)
    together = generate_greedily(
        student,
        collate_prompts(SampleBatch.of_tokens(prompts), description.sequence_format, vision.gather),
        max_new_tokens=8,
        eos_token_ids=eos,
    )
    for prompt, got in zip(prompts, together, strict=True):
        alone = collate_prompts(SampleBatch.of_tokens([prompt]), description.sequence_format, vision.gather)
        output = student.model.generate(
            input_ids=alone.input_ids, attention_mask=alone.attention_mask,
            pixel_values=alone.vision.pixel_values, max_new_tokens=8, do_sample=False,
            eos_token_id=list(eos), pad_token_id=0, suppress_tokens=list(range(300, 320)),
        )[0, alone.input_ids.shape[1] :].tolist()  # fmt: skip
        expected = output[: next((at for at, token in enumerate(output) if token in eos), len(output))]
        assert got == expected
        assert max(got, default=0) < 300
