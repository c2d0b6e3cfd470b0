"""Computes a student's relation matrix on a few held-out images, for display beside the teacher's cached one.

Legend: n visual tokens of the student, m rows of the teacher's matrix, d hidden, w rows of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from storage.reader.cache import Cache
from storage.records.records import PooledRelation, Relation
from storage.records.sample_batch import SampleBatch
from student_train.data.collate import GatherImages, SequenceFormat, collate
from student_train.losses.relation import make_resampling_matrix
from student_train.models.student import Student

NUM_IMAGES = 3
MOST_READ = 200  # samples that images are chosen from
MAX_SIDE = 64  # rows and columns of a matrix that is kept
NUM_DIGITS = 5  # after the point; entries of a matrix of norm 1 are about 1 / side
_HEAD_ROWS = 16_384  # rows of the head that are multiplied at once


@torch.inference_mode()
def compare_relations(
    student: Student,
    sequence_format: SequenceFormat,
    gather: GatherImages,
    samples: SampleBatch,
    relations: Sequence[Relation],
    *,
    centered: bool,
) -> list[dict[str, Any]]:
    """Return the student's matrix for the image of each sample, and its cosine to the teacher's, in JSON types.

    Each sample shows one image; `relations` are the teacher's. A matrix has the teacher's grid and Frobenius norm 1,
    and is averaged to at most MAX_SIDE rows. An image without a matrix has a `reason` instead.
    """
    device, documents = next(student.parameters()).device, []
    for at, relation in enumerate(relations):
        tokens = samples.record(at).tokens
        (image,) = tokens.images
        document: dict[str, Any] = {"sample_id": tokens.sample_id, "image": image.path}
        one = SampleBatch.of_tokens([tokens], [int(samples.indices[at])])
        batch = collate(one, sequence_format, gather).to(device)
        hidden = student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
        rows, head = hidden.index_select(0, batch.visual_positions), student.head.weight[: student.vocab_size]
        try:
            matrix = compute_relation_matrix(rows, head, relation, centered=centered)
        except ValueError as error:
            document["reason"] = str(error)
        else:
            small = average_blocks(matrix, MAX_SIDE).round(NUM_DIGITS)
            document |= {
                "cosine": round(float((matrix * relation.values).sum()), NUM_DIGITS),
                "num_tokens": len(matrix),
                "matrix": small.tolist(),
            }
        documents.append(document)
    return documents


def compute_relation_matrix(
    hidden: Float[Tensor, "n d"], head: Float[Tensor, "w d"], teacher: Relation, *, centered: bool
) -> NDArray[np.float32]:
    """Return G / ||G|| (m, m) with G = Z Z^T and Z the raw logits of the visual rows, on the teacher's grid.

    ValueError where the student's grid cannot be resampled to it.
    """
    hidden = hidden.float()
    if centered:
        hidden = hidden - hidden.mean(0, keepdim=True)
    pool = teacher.pool if isinstance(teacher, PooledRelation) else None
    resampling = make_resampling_matrix(len(hidden), teacher.num_visual_tokens, pool=pool)
    if resampling is not None:
        hidden = resampling.to(hidden.device) @ hidden
    gram = hidden.new_zeros(len(hidden), len(hidden))
    for part in head.split(_HEAD_ROWS):
        logits = hidden @ part.float().T
        gram += logits @ logits.T
    norm = float(gram.norm())
    return (gram / norm if norm > 0 else gram).cpu().numpy()


def average_blocks(matrix: NDArray[np.float32], max_side: int) -> NDArray[np.float64]:
    """Return the matrix (s, s) with s at most `max_side`: the means over blocks of neighbouring rows and columns."""
    side = min(len(matrix), max_side)
    edges = np.arange(side + 1) * len(matrix) // max(1, side)
    wide = matrix.astype(np.float64)
    sums = np.add.reduceat(np.add.reduceat(wide, edges[:-1], axis=0), edges[:-1], axis=1) if side else wide
    sizes = np.diff(edges)
    return sums / np.outer(sizes, sizes)


def choose_samples(cache: Cache, indices: NDArray[np.int64]) -> list[int]:
    """Return samples (at most NUM_IMAGES) that show one image each, each another one, among the first of `indices`."""
    chosen: dict[str, int] = {}
    for index in indices[cache.num_images[indices] == 1][:MOST_READ].tolist():
        (image,) = cache.read(index).tokens.images
        chosen.setdefault(image.key, index)
        if len(chosen) == NUM_IMAGES:
            break
    return list(chosen.values())
