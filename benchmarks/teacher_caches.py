"""A teacher over samples in this process: what it says of them, and caches of that by any selection.

Caches are written as a dump writes them (its selections and seeds, the real codec and files), one part each, but
without its engine: the teacher is run by transformers here, once for all of them.
Legend: r response rows, n visual rows of an image, v vocabulary, d hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.online import teacher_head, teacher_states
from storage.config import CacheSection, SelectionSection
from storage.encoding.output_head import make_head
from storage.identity import FORMAT_VERSION, Identity, stored_pixels
from storage.reader.cache import Cache
from storage.records.records import ImageRef, PartRecords, RelationMatrix, SampleRecord, TailTotal
from storage.records.sparse_rows import SparseRows
from storage.writer.cache_writer import CacheWriter
from student_train.data.collate import Batch, collate
from student_train.data.sample_images import ImageFolder, TensorStore, VisionGatherer
from student_train.models.loading import Checkpoint, load_for_inference, read_checkpoint
from student_train.models.student import Student
from teacher_dump.signals.sparsify import join_blocks, make_row_uniforms, select_blocks

_BATCH = 64


@dataclass(frozen=True, eq=False)
class Asked:
    """Samples and who is asked about them, opened for training students in this process."""

    tokens: Cache
    checkpoint: Checkpoint  # of the teacher; the students' processor and grid are the same
    vision: VisionGatherer
    features: TensorStore

    @staticmethod
    def open(cache: Path, teacher: Path) -> Asked:
        """The samples of a cache and a teacher, with a store for the features of a tower that all models share."""
        tokens, checkpoint, features = Cache.open(cache, ()), read_checkpoint(teacher), TensorStore(1 << 30)
        folder = ImageFolder(tokens.image_root, checkpoint.image_processor, pixels=stored_pixels(tokens.identity))
        vision = VisionGatherer(folder, features=features, pixels=TensorStore(0))
        return Asked(tokens, checkpoint, vision, features)

    @cached_property
    def teacher(self) -> Student:
        return load_for_inference(self.checkpoint, vocab_size=self.tokens.identity.vocab_size, features=self.features)

    def samples(self, split: str) -> list[int]:
        """Indices of a split's samples in `tokens`."""
        return [index for index, name in enumerate(self.tokens.splits) if name == split]

    def batches(self, indices: Sequence[int]) -> list[tuple[list[SampleRecord], Batch]]:
        """Samples in order, some at a time, without any of the teacher's rows."""
        groups = []
        for start in range(0, len(indices), _BATCH):
            samples = self.tokens.read_many(indices[start : start + _BATCH])
            groups.append((samples.records(), collate(samples, self.checkpoint.sequence_format, self.vision.gather)))
        return groups


@dataclass(frozen=True, eq=False)
class TeacherStates:
    """A split's samples, and the teacher's final-norm states of their rows."""

    records: list[SampleRecord]
    response: list[Tensor]  # (r, d) of each sample
    visual: Mapping[str, Tensor]  # (n, d) by image key

    @cached_property
    def _rows(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ids = [record.tokens.sample_id for record in self.records]
        images = [image for record in self.records for image in record.tokens.images]
        return dict(zip(ids, self.response, strict=True)), {image.sha256: self.visual[image.key] for image in images}

    def of(self, batch: Batch) -> dict[str, Tensor]:
        """What the teacher says of a batch of these samples: it is frozen, so the same at every step.

        Every sample's prompt begins with its image, after the same words: visual rows are the image's alone.
        """
        by_sample, by_image = self._rows
        response = torch.cat([by_sample[sample] for sample in batch.sample_ids])
        return {"response": response, "visual": torch.cat([by_image[name] for name in batch.vision.names])}


def ask_teacher(asked: Asked, split: str) -> TeacherStates:
    """Run the teacher over a split."""
    records: list[SampleRecord] = []
    response: list[Tensor] = []
    visual: dict[str, Tensor] = {}
    for group, batch in asked.batches(asked.samples(split)):
        states = teacher_states(asked.teacher, batch)
        records += group
        response += states["response"].split(batch.response_counts.tolist())
        images: list[ImageRef] = [image for record in group for image in record.tokens.images]
        per_image = states["visual"].split(asked.checkpoint.sequence_format.tokens_per_image)
        visual |= {image.key: rows for image, rows in zip(images, per_image, strict=True)}
    return TeacherStates(records, response, visual)


def write_cache(folder: Path, asked: Asked, states: TeacherStates, chosen: CacheSection) -> Cache:
    """A sealed cache of these samples in one part with the families chosen: response, visual, relation, hidden."""
    families, head = chosen.families, teacher_head(asked.teacher)
    writer = CacheWriter.open(folder, _identity(asked, chosen), families)
    records: dict[str, Any] = {}
    totals: dict[str, TailTotal] = {}
    if "hidden" in families:
        writer.put_head(make_head(head.weight.numpy(), None if head.bias is None else head.bias.numpy()))
        records["hidden"] = [rows.numpy() for rows in states.response]
    if "response" in families:
        keys = [record.tokens.sample_id for record in states.records]
        labels = [_labels(record) for record in states.records]
        records["response"], totals["response"] = _select(
            asked, "response", chosen.response, keys, states.response, labels
        )
    if "visual" in families:
        keys, hidden = list(states.visual), list(states.visual.values())
        rows, totals["visual"] = _select(asked, "visual", chosen.visual, keys, hidden, None)
        records["visual"] = dict(zip(keys, rows, strict=True))
    if "relation" in families:
        records["relation"] = {
            key: _relation(head.compute_logits(rows, dtype=torch.float32)) for key, rows in states.visual.items()
        }
    tokens = [record.tokens for record in states.records]
    writer.write_part(0, PartRecords(tokens=tokens, **records, tail_totals=totals))
    writer.seal()
    return Cache.open(folder)


def _identity(asked: Asked, chosen: CacheSection) -> Identity:
    """That of a cache of other families of the same samples."""
    selection = {family: getattr(chosen, family).model_dump(mode="json") for family in chosen.families}
    update = {"selection": selection, "num_parts": 1, "format_version": FORMAT_VERSION, "teacher_fingerprint": "t" * 64}
    return asked.tokens.identity.model_copy(update=update)


def _select(
    asked: Asked, family: str, section: SelectionSection, keys: Sequence[str], hidden: Sequence[Tensor],
    labels: Sequence[Tensor] | None,
) -> tuple[list[SparseRows], TailTotal]:  # fmt: skip
    """Each key's rows as a dump selects them, and the sum of their tails."""
    head, size = teacher_head(asked.teacher), asked.tokens.identity.vocab_size
    total = torch.zeros(size, dtype=torch.float64)
    rows = []
    for number, (key, states) in enumerate(zip(keys, hidden, strict=True)):
        uniforms = make_row_uniforms(len(states), seed=section.seed, family=family, key=key, num_sets=section.draw_sets)
        selected = select_blocks(
            head.compute_logits(states, dtype=torch.float32),
            labels=None if labels is None else labels[number],
            selection=section.selection,
            uniforms=uniforms,
            temperatures=section.temperatures,
            sums_tails=True,
        )
        rows.append(join_blocks(selected.blocks))
        assert selected.tail_sum is not None
        total += selected.tail_sum
    return rows, TailTotal(total.numpy(), sum(each.num_rows for each in rows))


def _relation(logits: Tensor) -> RelationMatrix:
    gram = logits @ logits.T
    norm = float(gram.norm())
    return RelationMatrix((gram / norm).numpy(), norm)


def _labels(record: SampleRecord) -> Tensor:
    return torch.from_numpy(record.tokens.token_ids[record.tokens.response_mask].astype(np.int64))


def bytes_per_row(cache: Cache) -> dict[str, float]:
    """Of each family's file, by its rows."""
    found = cache.statistics()
    rows = {**found["num_rows"], "hidden": int(cache.num_response_rows.sum())}
    return {family: size / rows[family] for family, size in found["bytes_by_family"].items() if rows.get(family)}
