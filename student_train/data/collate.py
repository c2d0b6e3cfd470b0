"""Collates flat batches of samples into batches of tensors: padded token ids, positions of rows, and teacher rows.

This is the only place that aligns positions.
Legend: b sequences, t tokens, r response rows, n visual tokens of an image, s of all images. Positions are flat,
into b * t. The row of the response token at position p lies at p - 1, which predicts it; a visual row is the
distribution *at* its visual token, so its position is not shifted. Training pads on the right: in a causal model
no row that is read attends to the padding, so no attention mask is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import IdentityError, StillhouseError
from storage.records.records import ImageRef, PooledRelation, Relation, TokensRecord
from storage.records.sample_batch import SampleBatch
from storage.records.sparse_rows import SparseRows
from student_train.data.sample_images import VisionInput
from student_train.losses.relation import TeacherRelations, make_resampling_matrix, stack_relations
from student_train.losses.sparse_divergence import TeacherRows

GatherImages = Callable[[SampleBatch], VisionInput]


@dataclass(frozen=True)
class SequenceFormat:
    """Special tokens, tokens per image and maximum length of the student's sequences."""

    image_token_id: int
    tokens_per_image: int | None  # visual tokens of the student; None: depends on the image's size
    pad_token_id: int
    max_length: int  # positions that the student's decoder has
    teacher_tokens_per_image: int | None = None  # rows of the cache, if the student's count is fixed


@dataclass(frozen=True, eq=False)
class ExpandedTokens:
    """The tokens of b samples, one sample after another, with image placeholders expanded for the student."""

    input_ids: NDArray[np.int64]  # (t,)
    is_response: NDArray[np.bool_]  # (t,)
    lengths: NDArray[np.int64]  # (b,) tokens of each sample
    visual_counts: Sequence[int]  # n of each image

    @property
    def sample(self) -> NDArray[np.int64]:
        """The number (t,) of the sample that each token belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def place(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position (t,) of each token if sample s starts at position starts[s]."""
        return np.arange(len(self.input_ids)) + (starts - self.lengths.cumsum() + self.lengths)[self.sample]


@dataclass(frozen=True)
class ImageRun:
    """A run of consecutive images with equal numbers of visual tokens, of the student and of the teacher."""

    num_images: int
    student: int  # n
    teacher: int  # m


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch on a device. Images are in the order of their placeholders, sequence by sequence."""

    sample_ids: tuple[str, ...]
    input_ids: Int[Tensor, "b t"]
    lengths: Int[Tensor, " b"]  # of each sequence, without padding
    response_positions: Int[Tensor, " r"]
    response_counts: Int[Tensor, " b"]  # rows of each sequence
    labels: Int[Tensor, " r"]
    visual_positions: Int[Tensor, " s"]
    vision: VisionInput
    image_counts: tuple[int, ...] = ()  # images of each sequence
    image_runs: tuple[ImageRun, ...] = ()  # of the images, in order
    response: TeacherRows | None = None  # r rows
    visual: TeacherRows | None = None  # the teacher's rows of all images
    relation: tuple[TeacherRelations, ...] | None = None  # of each of `image_runs`
    hidden: Float[Tensor, "r d"] | None = None  # the teacher's states of the response rows
    sequence: Float[Tensor, " b"] | None = None  # the teacher's logprob of each whole response
    counted: bool = True  # False: a filler, whose rows are in no loss

    @property
    def teacher_visual_counts(self) -> list[int]:
        """Number of the teacher's visual rows of each sequence."""
        of_images = [run.teacher for run in self.image_runs for _ in range(run.num_images)]
        ends = list(itertools.accumulate(self.image_counts))
        return [sum(of_images[end - count : end]) for end, count in zip(ends, self.image_counts, strict=True)]

    @property
    def is_token(self) -> Bool[Tensor, "b t"]:
        """False for padding."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on another device."""
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
            elif isinstance(value, TeacherRows | VisionInput):
                moved[name] = value.to(device)
        if self.relation is not None:
            moved["relation"] = tuple(each.to(device) for each in self.relation)
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts for generation, padded on the left so that all end at the same position."""

    input_ids: Int[Tensor, "b t"]
    attention_mask: Int[Tensor, "b t"]
    visual_positions: Int[Tensor, " s"]
    vision: VisionInput

    def to(self, device: torch.device) -> PromptBatch:
        """Return the same prompts on another device."""
        return PromptBatch(**{name: value.to(device) for name, value in vars(self).items()})


def expand_tokens(
    samples: SampleBatch, sequence_format: SequenceFormat, image_ids: Sequence[NDArray[np.int64]] | None = None
) -> ExpandedTokens:
    """Expand each image placeholder to the student's tokens of that image.

    `image_ids`: the token ids of each image, with separators; None: the fixed number of visual tokens for each.
    Errors: StillhouseError for a sample that is longer than the decoder, or that starts with a response token.
    """
    is_image = samples.token_ids == sequence_format.image_token_id
    if image_ids is None:
        assert sequence_format.tokens_per_image is not None
        visual_tokens = np.full(sequence_format.tokens_per_image, sequence_format.image_token_id)
        image_ids = [visual_tokens] * int(np.count_nonzero(is_image))
    repeats = np.ones(len(is_image), np.int64)
    repeats[is_image] = [len(ids) for ids in image_ids]
    input_ids = np.repeat(samples.token_ids, repeats).astype(np.int64)
    input_ids[np.repeat(is_image, repeats)] = np.concatenate([np.zeros(0, np.int64), *image_ids])
    counts = [int(np.count_nonzero(ids == sequence_format.image_token_id)) for ids in image_ids]
    offsets = np.concatenate([np.zeros(1, np.int64), repeats.cumsum()])[samples.token_offsets]
    expanded = ExpandedTokens(input_ids, np.repeat(samples.response_mask, repeats), np.diff(offsets), counts)
    _check_lengths(samples.sample_ids, expanded, sequence_format.max_length)
    return expanded


def _check_lengths(sample_ids: Sequence[str], tokens: ExpandedTokens, max_length: int) -> None:
    too_long = np.flatnonzero(tokens.lengths > max_length)
    if len(too_long):
        raise StillhouseError(
            f"sample {sample_ids[too_long[0]]!r} has {tokens.lengths[too_long[0]]} tokens, but this student has "
            f"{max_length} positions; dump with a smaller teacher.max_length, or take a student with more positions"
        )
    is_first = tokens.place(np.zeros_like(tokens.lengths)) == 0
    unpredicted = tokens.sample[is_first & tokens.is_response]
    if len(unpredicted):
        raise StillhouseError(
            f"sample {sample_ids[unpredicted[0]]!r}: its first token is a response token, which no position predicts; "
            "dump it again with a prompt before the answer"
        )


def collate(
    samples: SampleBatch,
    sequence_format: SequenceFormat,
    gather: GatherImages,
    *,
    families: Sequence[str] = (),
    counted: bool = True,
) -> Batch:
    """Collate one or more samples into a batch with the teacher's rows of `families`.

    A batch that is not counted has no response rows and no teacher rows. Errors: StillhouseError as `expand_tokens`
    and `gather`; IdentityError if a family needs visual grids that match and teacher and student differ.
    """
    signals = {name: _get_signal(samples, name) for name in families} if counted else {}
    vision = gather(samples)
    tokens = expand_tokens(samples, sequence_format, vision.inputs and vision.inputs.ids)
    length = int(tokens.lengths.max())
    positions = tokens.place(np.arange(len(samples)) * length)
    rows = positions[tokens.is_response & counted]
    image_runs: tuple[ImageRun, ...] = ()
    if "visual" in signals or "relation" in signals:
        shown = [
            (image, name) for name, images in zip(samples.sample_ids, samples.images, strict=True) for image in images
        ]
        for (image, name), count in zip(shown, tokens.visual_counts, strict=True):
            check_visual_grid(image, name, sequence_format, count)
        image_runs = _group_images(tokens.visual_counts, [image for image, _ in shown])
    return Batch(
        sample_ids=tuple(samples.sample_ids),
        input_ids=_pad(tokens, positions, length, sequence_format.pad_token_id),
        lengths=torch.from_numpy(tokens.lengths),
        response_positions=torch.from_numpy(rows - 1),
        response_counts=torch.from_numpy(np.bincount(rows // length, minlength=len(samples))),
        labels=torch.from_numpy(tokens.input_ids[tokens.is_response & counted]),
        visual_positions=torch.from_numpy(positions[tokens.input_ids == sequence_format.image_token_id]),
        vision=vision,
        image_counts=tuple(map(len, samples.images)),
        image_runs=image_runs,
        response=make_teacher_rows(signals["response"]) if "response" in signals else None,
        visual=make_teacher_rows(signals["visual"]) if "visual" in signals else None,
        relation=_stack_relations(signals["relation"], image_runs) if "relation" in signals else None,
        hidden=torch.from_numpy(signals["hidden"]) if "hidden" in signals else None,
        sequence=torch.from_numpy(signals["sequence"]) if "sequence" in signals else None,
        counted=counted,
    )


def _get_signal(samples: SampleBatch, family: str) -> Any:
    signal = getattr(samples, family)
    if signal is None:
        raise StillhouseError(
            f"sample {samples.sample_ids[0]!r} was read without the family {family}; open its cache with it"
        )
    return signal


def _pad(tokens: ExpandedTokens, positions: NDArray[np.int64], length: int, pad_token_id: int) -> Int[Tensor, "b t"]:
    input_ids = np.full(len(tokens.lengths) * length, pad_token_id, np.int64)
    input_ids[positions] = tokens.input_ids
    return torch.from_numpy(input_ids.reshape(-1, length))


def cut_prompt(tokens: TokensRecord, *, image_token_id: int, answer: int = 0) -> TokensRecord:
    """Cut a sample before one of its answers; keep the earlier answers and the images shown before the cut.

    Errors: StillhouseError for a sample without a response, or that starts with it.
    """
    spans = find_answer_spans(tokens)
    if not spans or spans[0][0] == 0:
        found = "a response token first" if spans else "no response token"
        raise StillhouseError(
            f"sample {tokens.sample_id!r} has {found}, expected a prompt and then a response; remove the sample from "
            "the evaluated splits"
        )
    stop = spans[answer][0]
    num_images = int(np.count_nonzero(tokens.token_ids[:stop] == image_token_id))
    return replace(
        tokens,
        token_ids=tokens.token_ids[:stop],
        response_mask=tokens.response_mask[:stop],
        images=tokens.images[:num_images],
    )


def find_answer_spans(tokens: TokensRecord) -> list[tuple[int, int]]:
    """Return start and stop of each answer in a sample's ids, end-of-turn token included."""
    edges = np.flatnonzero(np.diff(tokens.response_mask.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def collate_prompts(prompts: SampleBatch, sequence_format: SequenceFormat, gather: GatherImages) -> PromptBatch:
    """Collate one or more prompts. Errors: StillhouseError as `expand_tokens` and `gather`."""
    vision = gather(prompts)
    tokens = expand_tokens(prompts, sequence_format, vision.inputs and vision.inputs.ids)
    length = int(tokens.lengths.max())
    ends = np.arange(1, len(prompts) + 1) * length
    positions = tokens.place(ends - tokens.lengths)
    mask = np.arange(length) >= length - tokens.lengths[:, None]
    return PromptBatch(
        input_ids=_pad(tokens, positions, length, sequence_format.pad_token_id),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        visual_positions=torch.from_numpy(positions[tokens.input_ids == sequence_format.image_token_id]),
        vision=vision,
    )


def check_visual_grid(
    image: ImageRef, sample_id: str, sequence_format: SequenceFormat, count: int | None = None
) -> None:
    """Check that the student's visual tokens of an image match the teacher's or can be resampled to them.

    `count`: the student's number of visual tokens of this image; None: not known. Errors: IdentityError.
    """
    ours, theirs, expected = (
        sequence_format.tokens_per_image,
        image.num_visual_tokens,
        sequence_format.teacher_tokens_per_image,
    )
    found = f"visual grid: the cache has {theirs} visual tokens for image {image.path} of sample {sample_id!r}"
    if ours is None:
        if count not in (None, theirs):
            raise IdentityError(
                f"{found}, this student makes {count}; if the number depends on an image's size, student and "
                "teacher must tile images alike: give the student the teacher's image processor, or remove the "
                "visual and relation losses"
            )
        return
    if theirs != (ours if expected is None else expected):
        raise IdentityError(
            f"{found}, but {expected or ours} for other images; a student with a "
            "fixed grid needs the same number for all: remove the visual and relation losses"
        )
    try:
        make_resampling_matrix(ours, theirs)
    except ValueError as error:
        raise IdentityError(
            f"{found}, this student has {ours}, and {error} that could be resampled; "
            "take a student with the teacher's grid, or remove the visual and relation losses"
        ) from error


def _group_images(counts: Sequence[int], images: Sequence[ImageRef]) -> tuple[ImageRun, ...]:
    """Group consecutive images with equal numbers of visual tokens."""
    pairs = zip(counts, (image.num_visual_tokens for image in images), strict=True)
    return tuple(ImageRun(len(list(run)), *pair) for pair, run in itertools.groupby(pairs))


def make_teacher_rows(rows: SparseRows) -> TeacherRows:
    """Convert rows of the cache to tensors, which share their memory."""
    return TeacherRows(
        offsets=torch.from_numpy(rows.offsets),
        ids=torch.from_numpy(rows.ids.astype(np.int64)),
        logprobs=torch.from_numpy(rows.logprobs),
        num_exact=torch.from_numpy(rows.num_exact.astype(np.int64)),
        tail_mass=torch.from_numpy(rows.tail_mass),
        entropy=torch.from_numpy(rows.entropy),
        log_sum_exp=torch.from_numpy(rows.log_sum_exp),
    )


def _stack_relations(relations: Sequence[Relation], image_runs: Sequence[ImageRun]) -> tuple[TeacherRelations, ...]:
    runs, start = [], 0
    for run in image_runs:
        of_run = relations[start : start + run.num_images]
        pooled = [len(each.values) for each in of_run[:1] if isinstance(each, PooledRelation)]
        runs.append(stack_relations(of_run, size=pooled[0] if pooled else run.teacher))
        start += run.num_images
    return tuple(runs)
