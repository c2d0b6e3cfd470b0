"""Image inputs from a vision-language model's own processor: the model's arguments, and the token ids of each image.

This file knows no architecture: the processor decides about tiles, patch grids and their sizes. The tokens of an
image in the sequence (visual tokens, and separators in some models) depend only on its size, so the processor is
called once for each size.

Legend: n visual tokens of an image, e tokens that stand for it, n of them visual.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import StillhouseError
from storage.images.pictures import make_blank_picture
from storage.images.pixels import Picture
from storage.images.placeholders import get_placeholder, keep_image_ids

_OF_TEXT = ("input_ids", "attention_mask")
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # 1 where an image is
_REMEMBERED_SIZES = 4096
_BLANK = (32, 32)  # pixels
_PROBED_SIZES = ((32, 32), (224, 224), (1344, 224), (640, 480))  # numbers that depend on the size differ among these


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """The images of a batch as model inputs; one blank image, in no sequence, for a batch without images."""

    tensors: Mapping[str, Tensor]  # by the names of the model's arguments; empty for a text-only model
    token_types: tuple[str, ...]  # arguments that say which positions are visual
    ids: tuple[NDArray[np.int64], ...]  # (e,) of each image
    blank_ids: NDArray[np.int64] | None  # of the blank image

    def to(self, device: torch.device, *, non_blocking: bool = False) -> ModelInputs:
        """Return the same inputs on another device."""
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in self.tensors.items()}
        return replace(self, tensors=moved)


class ImageProcessorAdapter:
    """Wraps a transformers processor to convert images only. Thread-safe."""

    def __init__(self, processor: Any, *, image_token_id: int) -> None:
        """`image_token_id`: the placeholder of an image, -1 for a model without images."""
        self._processor = processor
        self._image_token_id = image_token_id
        self._by_size: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    @property
    def image_processor(self) -> Any:
        """The transformers image processor; None for a model without images."""
        return getattr(self._processor, "image_processor", None)

    def make_inputs(self, pictures: Sequence[Picture]) -> ModelInputs:
        """Convert images, in order, to model inputs. StillhouseError: the processor refuses one."""
        if self._image_token_id < 0:
            return ModelInputs({}, (), (), None)
        shown = pictures or [make_blank_picture(_BLANK)]
        made = self._run_processor(shown)
        ids = tuple(self.expand_image(picture.size) for picture in shown)
        return ModelInputs(
            tensors={name: value for name, value in made.items() if name not in (*_OF_TEXT, *_TOKEN_TYPES)},
            token_types=tuple(name for name in _TOKEN_TYPES if name in made),
            ids=ids if pictures else (),
            blank_ids=None if pictures else ids[0],
        )

    def expand_image(self, size: tuple[int, int]) -> NDArray[np.int64]:
        """Return the token ids (e,) of an image of this width and height, separators included."""
        with self._lock:
            if size not in self._by_size:
                if len(self._by_size) == _REMEMBERED_SIZES:
                    del self._by_size[next(iter(self._by_size))]
                ids = self._run_processor([make_blank_picture(size)])["input_ids"][0].numpy().astype(np.int64)
                token_id = self._image_token_id
                token = self._processor.tokenizer.convert_ids_to_tokens(token_id)
                ids = keep_image_ids(ids, self._processor, image_token=token, image_token_id=token_id)
                self._by_size[size] = ids
            return self._by_size[size]

    def count_fixed_tokens(self) -> int | None:
        """Return the number of visual tokens of every image; None if it depends on the image's size."""
        counts = {int(np.count_nonzero(self.expand_image(size) == self._image_token_id)) for size in _PROBED_SIZES}
        return counts.pop() if len(counts) == 1 else None

    def _run_processor(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        token = self._processor.tokenizer.convert_ids_to_tokens(self._image_token_id)
        text = [get_placeholder(self._processor, token) * len(pictures)]
        try:
            return dict(
                self._processor(images=list(pictures), text=text, add_special_tokens=False, return_tensors="pt")
            )
        except ValueError as error:
            sizes = ", ".join(f"{picture.width} x {picture.height}" for picture in pictures)
            raise StillhouseError(f"the student's processor refuses images of {sizes}: {error}") from error
