"""Prepares samples: token ids and images, expanded as the teacher will see them. Needs no teacher.

Legend: r response rows, t unexpanded tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storage.images.settings import PixelSettings
from storage.records.records import ImageRef, TokensRecord, compute_image_key
from teacher_dump.config import TooLong
from teacher_dump.data.image_loading import LoadedImage, load_image
from teacher_dump.data.sample import Sample, SampleRefusedError
from teacher_dump.prompts.image_tokens import Expansion, VisualGrid, expand_image_tokens
from teacher_dump.prompts.preprocessor import Prompt, PromptBuilder
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.prompts.truncation import compute_kept_length


@dataclass(frozen=True, eq=False)
class PreparedSample:
    """A sample that is ready for the teacher."""

    record: TokensRecord
    images: tuple[LoadedImage, ...]
    expansion: Expansion
    is_cut: bool = False  # it was too long, and was cut

    @property
    def prompt(self) -> TeacherPrompt:
        pixels, keys = (tuple(getattr(image, name) for image in self.images) for name in ("pixels", "sha256"))
        return TeacherPrompt(self.record.token_ids, pixels, keys, self.record.response_mask)

    @property
    def response_positions(self) -> np.ndarray:
        """(r,) the position before each response token: its hidden state predicts that token."""
        return self.expansion.positions[self.record.response_mask] - 1


class Preparer:
    """Turns samples into token ids and images; refuses samples that are too long or broken."""

    def __init__(
        self,
        *,
        prompts: PromptBuilder,
        grid: VisualGrid,
        image_token_id: int,
        preprocessing_fingerprint: str,
        pixels: PixelSettings,
        image_root: Path,
        max_length: int,  # tokens, visual tokens included
        too_long: TooLong = "refuse",
    ) -> None:
        self._prompts = prompts
        self._grid = grid
        self._image_token_id = image_token_id
        self._preprocessing = preprocessing_fingerprint
        self._pixels = pixels
        self._image_root = image_root
        self._max_length = max_length
        self._too_long: TooLong = too_long

    def prepare(self, sample: Sample) -> PreparedSample:
        """Prepares a sample for the teacher.

        Raises SampleRefusedError for a bad image, a prompt that cannot be built, more than `max_length` tokens.
        """
        images = tuple(load_image(self._image_root, path, self._pixels) for path in sample.images)
        prompt = self._prompts.build(sample)
        grids = [self._grid.ids(image.pixels) for image in images]
        expansion = expand_image_tokens(prompt.token_ids, grids, self._image_token_id)
        is_cut = len(expansion.token_ids) > self._max_length
        if is_cut:
            mask, positions = prompt.response_mask, expansion.positions
            kept = compute_kept_length(mask, positions, max_length=self._max_length, rule=self._too_long)
            if kept is not None:
                prompt = Prompt(prompt.token_ids[:kept], mask[:kept])
                images = images[: np.count_nonzero(prompt.token_ids == self._image_token_id)]
                expansion = expand_image_tokens(prompt.token_ids, grids[: len(images)], self._image_token_id)
        counts = [len(positions) for positions in expansion.visual]
        if len(expansion.token_ids) > self._max_length:
            raise SampleRefusedError(
                f"has {len(expansion.token_ids)} tokens, {sum(counts)} of them visual; "
                f"teacher.max_length allows {self._max_length}"
            )
        if prompt.response_mask[:1].any():
            raise SampleRefusedError("its answer starts at the first token, which no position predicts")
        places = np.flatnonzero(prompt.token_ids == self._image_token_id)
        refs = tuple(
            ImageRef(
                path=image.path,
                sha256=image.sha256,
                num_visual_tokens=count,
                key=compute_image_key(
                    prompt.token_ids[: place + 1],
                    [earlier.sha256 for earlier in images[: number + 1]],
                    self._preprocessing,
                ),
            )
            for number, (image, count, place) in enumerate(zip(images, counts, places, strict=True))
        )
        record = TokensRecord(sample.key, sample.split, sample.category, prompt.token_ids, prompt.response_mask, refs)
        return PreparedSample(record, images, expansion, is_cut)

    def restore(self, record: TokensRecord) -> PreparedSample:
        """Prepares a cached sample for the teacher again. Raises SampleRefusedError if an image has changed."""
        images = tuple(load_image(self._image_root, ref.path, self._pixels) for ref in record.images)
        for image, ref in zip(images, record.images, strict=True):
            if image.sha256 != ref.sha256:
                raise SampleRefusedError(
                    f"image {ref.path!r} has the sha256 {image.sha256}, the cache has {ref.sha256}"
                )
        expansion = expand_image_tokens(
            record.token_ids, [self._grid.ids(image.pixels) for image in images], self._image_token_id
        )
        for positions, ref in zip(expansion.visual, record.images, strict=True):
            if len(positions) != ref.num_visual_tokens:
                raise SampleRefusedError(
                    f"image {ref.path!r} has {len(positions)} visual tokens, the cache has {ref.num_visual_tokens}"
                )
        return PreparedSample(record, images, expansion)
