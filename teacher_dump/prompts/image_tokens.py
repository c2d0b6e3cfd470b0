"""Expands image tokens in a teacher's sequence, and tracks the position of every token.

A visual token is a position that holds the teacher's image token, which the model replaces by a feature of its vision
tower: 576 per image in LLaVA-1.5, a number that depends on the resolution in Qwen2-VL, those of every tile and of the
whole image in Idefics3. A learnt newline among the features (LLaVA-NeXT, LLaVA-OneVision) is a visual token, too, as
in vLLM. Separators with an id of their own (`<row_1_col_2>`, `<|vision_start|>`, the newlines between tiles) are not:
they lie between the visual tokens and have no rows.

Legend: t unexpanded tokens, one a placeholder; T expanded positions; n visual tokens of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import StillhouseError
from storage.images.pictures import make_blank_picture
from storage.images.pixels import Picture
from storage.images.placeholders import get_placeholder, keep_image_ids
from teacher_dump.data.sample import SampleRefusedError

_PROBED_SIZES = ((32, 32), (224, 224), (1344, 224), (640, 480))  # a grid that depends on size differs between them
_REMEMBERED_SIZES = 4096  # of images; a size costs one call of the image processor and a few kB


@dataclass(frozen=True, eq=False)
class Expansion:
    """Expanded ids, and the position of each unexpanded token in them."""

    token_ids: NDArray[np.int64]  # (T,)
    positions: NDArray[np.int64]  # (t,) a placeholder's is the first of its image
    visual: tuple[NDArray[np.int64], ...]  # (n,) each image's visual tokens; separators may lie between them

    def describe_difference(self, engine_ids: NDArray[np.int64]) -> str:
        """Describes the first token in which an engine's expansion differs; "" if it is the same."""
        length = min(len(self.token_ids), len(engine_ids))
        differing = np.flatnonzero(self.token_ids[:length] != engine_ids[:length])
        why = "it expands images in another way than the teacher's processor"
        if len(differing):
            place = int(differing[0])
            return (
                f"position {place}: the engine has token {engine_ids[place]}, expected {self.token_ids[place]}; {why}"
            )
        if len(engine_ids) != len(self.token_ids):
            return f"the engine has {len(engine_ids)} positions, expected {len(self.token_ids)}; {why}"
        return ""


def expand_image_tokens(
    token_ids: NDArray[np.int32], images: Sequence[NDArray[np.int64]], image_token_id: int
) -> Expansion:
    """Replaces each placeholder by its image's ids (see VisualGrid.ids). Raises ValueError if the counts differ."""
    is_image = token_ids == image_token_id
    if int(np.count_nonzero(is_image)) != len(images):
        raise ValueError(f"{np.count_nonzero(is_image)} placeholders for {len(images)} images")
    lengths = np.ones(len(token_ids), np.int64)
    lengths[is_image] = [len(ids) for ids in images]
    positions = np.cumsum(lengths) - lengths
    expanded = np.repeat(token_ids.astype(np.int64), lengths)
    visual = []
    for start, ids in zip(positions[is_image].tolist(), images, strict=True):
        expanded[start : start + len(ids)] = ids
        visual.append(start + np.flatnonzero(ids == image_token_id))
    return Expansion(token_ids=expanded, positions=positions, visual=tuple(visual))


class VisualGrid:
    """Has a teacher's processor expand images; caches the ids by image size, on which alone they depend."""

    def __init__(self, processor: Any, image_token_id: int) -> None:
        """`image_token_id` is -1 for a teacher without images."""
        self._processor = processor
        self._image_token_id = image_token_id
        self._by_size: dict[tuple[int, int], NDArray[np.int64]] = {}

    def ids(self, image: Picture) -> NDArray[np.int64]:
        """Returns the ids of this image's tokens, separators included.

        Raises SampleRefusedError for a size that the processor refuses; StillhouseError if it gives no visual tokens.
        """
        if image.size not in self._by_size:
            if len(self._by_size) == _REMEMBERED_SIZES:
                del self._by_size[next(iter(self._by_size))]
            self._by_size[image.size] = self._probe(image.size)
        return self._by_size[image.size]

    @cached_property
    def is_fixed(self) -> bool:
        """Whether images of every size expand to the same tokens."""
        first, *others = (self._probe(size).tolist() for size in _PROBED_SIZES)
        return all(other == first for other in others)

    def count_fixed_tokens(self) -> int | None:
        """Returns the number of visual tokens of every image; None if it depends on an image's size."""
        return int(np.count_nonzero(self._probe(_PROBED_SIZES[0]) == self._image_token_id)) if self.is_fixed else None

    def _probe(self, size: tuple[int, int]) -> NDArray[np.int64]:
        token = self._processor.tokenizer.convert_ids_to_tokens(self._image_token_id)
        text = get_placeholder(self._processor, token)
        try:
            asked = self._processor(
                images=[make_blank_picture(size)], text=[text], add_special_tokens=False, return_tensors="np"
            )
        except ValueError as error:
            raise SampleRefusedError(f"the processor refuses an image of {size[0]} x {size[1]}: {error}") from error
        ids = np.asarray(asked["input_ids"][0], np.int64)
        ids = keep_image_ids(ids, self._processor, image_token=token, image_token_id=self._image_token_id)
        if not np.any(ids == self._image_token_id):
            raise StillhouseError(f"the processor gives an image of {size[0]} x {size[1]} no visual tokens")
        return ids
