"""Collates sample records into batches: padded token ids, positions of rows, and teacher rows.

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

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import IdentityError, StillhouseError
from storage.records.records import ImageRef, PooledRelation, SampleRecord, TokensRecord
from storage.records.sparse_rows import SparseRows
from student_train.data.sample_images import VisionInput
from student_train.losses.relation import TeacherRelations, make_resampling_matrix, stack_relations
from student_train.losses.sparse_divergence import TeacherRows

GatherImages = Callable[[Sequence[tuple[str, ImageRef]]], VisionInput]


@dataclass(frozen=True)
class SequenceFormat:
    """Special tokens, tokens per image and maximum length of the student's sequences."""

    image_token_id: int
    tokens_per_image: int | None  # visual tokens of the student; None: depends on the image's size
    pad_token_id: int
    max_length: int  # positions that the student's decoder has
    teacher_tokens_per_image: int | None = None  # rows of the cache, if the student's count is fixed


@dataclass(frozen=True, eq=False)
class ExpandedSample:
    """One sample with its image placeholders expanded for the student. Positions are within the sequence."""

    input_ids: NDArray[np.int64]  # (t,)
    response_positions: NDArray[np.int64]  # (r,) where each response token is predicted
    labels: NDArray[np.int64]  # (r,) the response tokens
    visual_positions: NDArray[np.int64]  # (s,) of all images
    visual_counts: tuple[int, ...]  # n of each image


@dataclass(frozen=True)
class ImageRun:
    """A run of consecutive images with equal numbers of visual tokens, of the student and of the teacher."""

    num_images: int
    student: int  # n
    teacher: int  # m


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch. Images are in the order of their placeholders, sequence by sequence."""

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


def expand_sample(
    tokens: TokensRecord, sequence_format: SequenceFormat, image_ids: Sequence[NDArray[np.int64]] | None = None
) -> ExpandedSample:
    """Expand each image placeholder of a sample to the student's tokens of that image.

    `image_ids`: the token ids of each image, with separators; None: the fixed number of visual tokens for each.
    Errors: StillhouseError for a sample that is longer than the decoder, or that starts with a response token.
    """
    is_image = tokens.token_ids == sequence_format.image_token_id
    if image_ids is None:
        assert sequence_format.tokens_per_image is not None
        num_images = int(np.count_nonzero(is_image))
        visual_tokens = np.full(sequence_format.tokens_per_image, sequence_format.image_token_id)
        image_ids = [visual_tokens] * num_images
    repeats = np.ones(len(tokens.token_ids), np.int64)
    repeats[is_image] = [len(ids) for ids in image_ids]
    input_ids = np.repeat(tokens.token_ids, repeats).astype(np.int64)
    input_ids[np.repeat(is_image, repeats)] = np.concatenate([np.zeros(0, np.int64), *image_ids])
    if len(input_ids) > sequence_format.max_length:
        raise StillhouseError(
            f"sample {tokens.sample_id!r} has {len(input_ids)} tokens, but this student has "
            f"{sequence_format.max_length} positions; dump with a smaller teacher.max_length, or take a student "
            "with more positions"
        )
    responses = np.flatnonzero(np.repeat(tokens.response_mask, repeats))
    if responses.size and responses[0] == 0:
        raise StillhouseError(
            f"sample {tokens.sample_id!r}: its first token is a response token, which no position predicts; "
            "dump it again with a prompt before the answer"
        )
    return ExpandedSample(
        input_ids=input_ids,
        response_positions=responses - 1,
        labels=input_ids[responses],
        visual_positions=np.flatnonzero(input_ids == sequence_format.image_token_id),
        visual_counts=tuple(int(np.count_nonzero(ids == sequence_format.image_token_id)) for ids in image_ids),
    )


def _expand_samples(
    samples: Sequence[TokensRecord], sequence_format: SequenceFormat, vision: VisionInput
) -> list[ExpandedSample]:
    if vision.inputs is None:
        return [expand_sample(tokens, sequence_format) for tokens in samples]
    ids = iter(vision.inputs.ids)
    return [
        expand_sample(tokens, sequence_format, list(itertools.islice(ids, len(tokens.images)))) for tokens in samples
    ]


def collate(
    records: Sequence[SampleRecord],
    sequence_format: SequenceFormat,
    gather: GatherImages,
    *,
    families: Sequence[str] = (),
    counted: bool = True,
) -> Batch:
    """Collate one or more records into a batch with the teacher's rows of `families`.

    A batch that is not counted has no response rows and no teacher rows. Errors: StillhouseError as `expand_sample`
    and `gather`; IdentityError if a family needs visual grids that match and teacher and student differ.
    """
    if not counted:
        families = ()
    images = [(record.tokens.sample_id, image) for record in records for image in record.tokens.images]
    vision = gather(images)
    layouts = _expand_samples([record.tokens for record in records], sequence_format, vision)
    length = max(len(item.input_ids) for item in layouts)
    input_ids = np.full((len(records), length), sequence_format.pad_token_id, np.int64)
    for row, item in enumerate(layouts):
        input_ids[row, : len(item.input_ids)] = item.input_ids
    starts = np.arange(len(records)) * length
    visual = [item.visual_positions + start for item, start in zip(layouts, starts, strict=True)]
    response = [item.response_positions + start for item, start in zip(layouts, starts, strict=True)]
    labels = [item.labels for item in layouts]
    if not counted:
        response, labels = ([np.zeros(0, np.int64)] * len(records) for _ in range(2))
    image_runs: tuple[ImageRun, ...] = ()
    if "visual" in families or "relation" in families:
        for record, item in zip(records, layouts, strict=True):
            check_visual_grid(record.tokens, sequence_format, item.visual_counts)
        image_runs = _group_images(
            [count for item in layouts for count in item.visual_counts], [image for _, image in images]
        )
    return Batch(
        sample_ids=tuple(record.tokens.sample_id for record in records),
        input_ids=torch.from_numpy(input_ids),
        lengths=torch.tensor([len(item.input_ids) for item in layouts]),
        response_positions=torch.from_numpy(np.concatenate(response)),
        response_counts=torch.tensor([len(each) for each in response]),
        labels=torch.from_numpy(np.concatenate(labels)),
        visual_positions=torch.from_numpy(np.concatenate(visual)),
        vision=vision,
        image_counts=tuple(len(record.tokens.images) for record in records),
        image_runs=image_runs,
        response=make_teacher_rows([_get_response(record) for record in records]) if "response" in families else None,
        visual=make_teacher_rows(_collect_image_signals(records, "visual")) if "visual" in families else None,
        relation=_stack_relations(records, image_runs) if "relation" in families else None,
        hidden=torch.from_numpy(np.concatenate([_get_hidden(each) for each in records]))
        if "hidden" in families
        else None,
        sequence=torch.tensor([_get_sequence_logprob(record) for record in records])
        if "sequence" in families
        else None,
        counted=counted,
    )


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


def collate_prompts(
    prompts: Sequence[TokensRecord], sequence_format: SequenceFormat, gather: GatherImages
) -> PromptBatch:
    """Collate one or more prompts. Errors: StillhouseError as `expand_sample` and `gather`."""
    vision = gather([(tokens.sample_id, image) for tokens in prompts for image in tokens.images])
    layouts = _expand_samples(prompts, sequence_format, vision)
    length = max(len(item.input_ids) for item in layouts)
    input_ids = np.full((len(prompts), length), sequence_format.pad_token_id, np.int64)
    mask = np.zeros((len(prompts), length), np.int64)
    visual = []
    for row, item in enumerate(layouts):
        start = length - len(item.input_ids)
        input_ids[row, start:] = item.input_ids
        mask[row, start:] = 1
        visual.append(item.visual_positions + row * length + start)
    return PromptBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask),
        visual_positions=torch.from_numpy(np.concatenate(visual)),
        vision=vision,
    )


def check_visual_grid(
    tokens: TokensRecord, sequence_format: SequenceFormat, counts: Sequence[int] | None = None
) -> None:
    """Check that the student's visual tokens of each image match the teacher's or can be resampled to them.

    `counts`: the student's number of visual tokens of each image; None: the fixed number. Errors: IdentityError.
    """
    for number, image in enumerate(tokens.images):
        ours = sequence_format.tokens_per_image if counts is None else counts[number]
        theirs, expected = image.num_visual_tokens, sequence_format.teacher_tokens_per_image
        found = (
            f"visual grid: the cache has {theirs} visual tokens for image {image.path} of sample {tokens.sample_id!r}"
        )
        if sequence_format.tokens_per_image is None:
            if ours not in (None, theirs):
                raise IdentityError(
                    f"{found}, this student makes {ours}; if the number depends on an image's size, student and "
                    "teacher must tile images alike: give the student the teacher's image processor, or remove the "
                    "visual and relation losses"
                )
            continue
        if theirs != (sequence_format.tokens_per_image if expected is None else expected):
            raise IdentityError(
                f"{found}, but {expected or sequence_format.tokens_per_image} for other images; a student with a "
                "fixed grid needs the same number for all: remove the visual and relation losses"
            )
        try:
            make_resampling_matrix(sequence_format.tokens_per_image, theirs)
        except ValueError as error:
            raise IdentityError(
                f"{found}, this student has {sequence_format.tokens_per_image}, and {error} that could be resampled; "
                "take a student with the teacher's grid, or remove the visual and relation losses"
            ) from error


def _group_images(counts: Sequence[int], images: Sequence[ImageRef]) -> tuple[ImageRun, ...]:
    """Group consecutive images with equal numbers of visual tokens."""
    pairs = zip(counts, (image.num_visual_tokens for image in images), strict=True)
    return tuple(ImageRun(len(list(run)), *pair) for pair, run in itertools.groupby(pairs))


def make_teacher_rows(parts: Sequence[SparseRows]) -> TeacherRows:
    """Concatenate rows of the cache and convert them to tensors."""
    rows = SparseRows.concatenate(parts)
    return TeacherRows(
        offsets=torch.from_numpy(rows.offsets),
        ids=torch.from_numpy(rows.ids.astype(np.int64)),
        logprobs=torch.from_numpy(rows.logprobs),
        num_exact=torch.from_numpy(rows.num_exact.astype(np.int64)),
        tail_mass=torch.from_numpy(rows.tail_mass),
        entropy=torch.from_numpy(rows.entropy),
        log_sum_exp=torch.from_numpy(rows.log_sum_exp),
    )


def _get_response(record: SampleRecord) -> SparseRows:
    rows = record.response
    expected = record.tokens.num_response_tokens
    if rows is None or rows.num_rows != expected:
        got = "no rows" if rows is None else f"{rows.num_rows} rows"
        raise StillhouseError(
            f"sample {record.tokens.sample_id!r}: {got} for {expected} response tokens; run stillhouse verify"
        )
    return rows


def _get_sequence_logprob(record: SampleRecord) -> float:
    if record.sequence is None:
        raise StillhouseError(f"sample {record.tokens.sample_id!r}: no sequence logprob; run stillhouse verify")
    return record.sequence.logprob


def _collect_image_signals(records: Sequence[SampleRecord], family: str) -> list:
    signals = []
    for record in records:
        for image in record.tokens.images:
            signal = getattr(record, family).get(image.key)
            if signal is None:
                raise StillhouseError(
                    f"sample {record.tokens.sample_id!r}: image {image.path} has no {family} rows; "
                    "run stillhouse verify"
                )
            signals.append(signal)
    return signals


def _stack_relations(records: Sequence[SampleRecord], image_runs: Sequence[ImageRun]) -> tuple[TeacherRelations, ...]:
    relations = iter(_collect_image_signals(records, "relation"))
    runs = []
    for run in image_runs:
        of_run = list(itertools.islice(relations, run.num_images))
        pooled = [len(each.values) for each in of_run[:1] if isinstance(each, PooledRelation)]
        runs.append(stack_relations(of_run, size=pooled[0] if pooled else run.teacher))
    return tuple(runs)


def _get_hidden(record: SampleRecord) -> NDArray[np.float32]:
    expected = record.tokens.num_response_tokens
    if record.hidden is None or len(record.hidden) != expected:
        got = "no hidden states" if record.hidden is None else f"{len(record.hidden)} hidden states"
        raise StillhouseError(
            f"sample {record.tokens.sample_id!r}: {got} for {expected} response tokens; run stillhouse verify"
        )
    return record.hidden
