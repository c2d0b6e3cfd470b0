"""The visual grid: how many positions an image takes in a teacher, and where every token lies once it does.

Legend: t unexpanded tokens, one a placeholder; T expanded positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from storage.errors import StillhouseError


@dataclass(frozen=True, eq=False)
class Expansion:
    """Expanded ids, and where each unexpanded token lies in them."""

    token_ids: NDArray[np.int64]  # (T,)
    positions: NDArray[np.int64]  # (t,) a placeholder's is its first visual token
    spans: tuple[tuple[int, int], ...]  # start : stop of each image's visual tokens

    def check(self, engine_ids: NDArray[np.int64]) -> None:
        """StillhouseError naming the first token in which an engine's expansion differs."""
        length = min(len(self.token_ids), len(engine_ids))
        differing = np.flatnonzero(self.token_ids[:length] != engine_ids[:length])
        if len(differing):
            place = int(differing[0])
            raise StillhouseError(
                f"position {place}: the engine has token {engine_ids[place]}, expected {self.token_ids[place]}; "
                "it expands images in another way than the teacher's processor"
            )
        if len(engine_ids) != len(self.token_ids):
            raise StillhouseError(
                f"the engine has {len(engine_ids)} positions, expected {len(self.token_ids)}; "
                "it expands images in another way than the teacher's processor"
            )


def expand(token_ids: NDArray[np.int32], counts: Sequence[int], image_token_id: int) -> Expansion:
    """Each placeholder repeated as often as its image has visual tokens; ValueError if their numbers differ."""
    is_image = token_ids == image_token_id
    if int(np.count_nonzero(is_image)) != len(counts):
        raise ValueError(f"{np.count_nonzero(is_image)} placeholders for {len(counts)} images")
    repeats = np.ones(len(token_ids), np.int64)
    repeats[is_image] = counts
    positions = np.cumsum(repeats) - repeats
    starts = positions[is_image].tolist()
    return Expansion(
        token_ids=np.repeat(token_ids.astype(np.int64), repeats),
        positions=positions,
        spans=tuple((start, start + count) for start, count in zip(starts, counts, strict=True)),
    )


class VisualGrid:
    """Asks a teacher's processor how many visual tokens an image becomes; remembered by size."""

    def __init__(self, processor: Any, image_token_id: int) -> None:
        """`image_token_id` is -1 for a teacher without images."""
        self._processor = processor
        self._image_token_id = image_token_id
        self._by_size: dict[tuple[int, int], int] = {}

    def num_visual_tokens(self, image: Image) -> int:
        """Positions that this image takes. StillhouseError: the processor gives none."""
        if image.size not in self._by_size:
            text = self._processor.tokenizer.convert_ids_to_tokens(self._image_token_id)
            ids = self._processor(images=[image], text=[text], return_tensors="np")["input_ids"][0]
            count = int(np.count_nonzero(np.asarray(ids) == self._image_token_id))
            if count == 0:
                raise StillhouseError(f"the processor gives an image of {image.size} no visual tokens")
            self._by_size[image.size] = count
        return self._by_size[image.size]
