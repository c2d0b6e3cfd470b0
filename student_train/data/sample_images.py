"""Loads a cache's images from a folder or from the cache, checks their sha256, and keeps pixels or features.

Legend: i images, n visual tokens of an image, f channels of the vision tower, k images whose features are
known, p images whose pixels are needed, c h w channels, height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from storage.errors import StillhouseError
from storage.identity import stored_pixels
from storage.images.pictures import make_blank_picture
from storage.images.pixels import ImageDecodeError, Picture, make_pixels
from storage.images.settings import PixelSettings
from storage.reader.cache import Cache
from storage.records.records import ImageRef
from storage.records.sample_batch import SampleBatch
from student_train.data.image_inputs import ImageProcessorAdapter, ModelInputs


def open_images(cache: Cache, configured: str | None, processor: Any) -> ImageFolder:
    """Open the images of a cache's samples: in the configured folder, or in the one that the cache names.

    The latter may have moved with the cache. If it does not exist and none is configured, images are read from the
    cache itself, if it holds them.
    """
    root = cache.image_root if configured is None else Path(configured)
    travels = configured is None and "images" in cache.families and not root.is_dir()
    return ImageFolder(
        root,
        processor,
        pixels=stored_pixels(cache.identity),
        cache=cache if travels else None,
        follows_links=configured is not None or cache.follows_image_links,
    )


class ImageFolder:
    """The images below a root, preprocessed for the student's vision tower."""

    def __init__(
        self,
        root: str | Path,
        processor: Any,
        *,
        pixels: PixelSettings,
        cache: Cache | None = None,
        follows_links: bool = True,
    ) -> None:
        """`processor`: a transformers image processor with a fixed output size, or an ImageProcessorAdapter.

        `pixels`: how a file's bytes are decoded. `cache`: holds the files, which are then not read below the root.
        `follows_links`: whether links may lead out of the root.
        """
        self._follows_links = follows_links
        self._cache = cache
        self._settings = pixels
        self.root = Path(root)
        self._resolved_root = self.root.resolve()
        self.processor = processor

    def load_pixels(self, image: ImageRef, *, sample_id: str, index: int | None = None) -> Float[Tensor, "c h w"]:
        """Load one image, preprocessed for the tower. Arguments and errors as `load_picture`."""
        return self._process(self.load_picture(image, sample_id=sample_id, index=index))

    def load_picture(self, image: ImageRef, *, sample_id: str, index: int | None = None) -> Picture:
        """Load one image in RGB.

        `sample_id`: for messages. `index`: the sample's position in the cache, for images that are read from it.
        Errors: StillhouseError with sample and file, for a file that is missing, outside the root, not the one that
        the teacher saw, or not an image. CorruptPartError of the cache.
        """
        place = f"sample {sample_id!r}: image {self.root / image.path}"
        if self._cache is not None:
            assert index is not None
            content = self._cache.image_bytes(index, image.sha256)
        else:
            content = self._read_content(image, place)
        got = hashlib.sha256(content).hexdigest()
        if got != image.sha256:
            raise StillhouseError(
                f"{place}: sha256 is {got[:12]}…, expected {image.sha256[:12]}… as in the cache; "
                "give the folder of the original images, or dump again"
            )
        try:
            return make_pixels(content, self._settings)
        except ImageDecodeError as error:
            raise StillhouseError(f"{place}: cannot be decoded: {error}") from error

    def make_blank(self) -> Float[Tensor, "1 c h w"]:
        """Return a black image for a batch without images, so that parameters get a (zero) gradient on every rank."""
        return self._process(make_blank_picture((32, 32)))[None]

    def _process(self, picture: Picture) -> Float[Tensor, "c h w"]:
        return self.processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def _read_content(self, image: ImageRef, place: str) -> bytes:
        file = image.file(self.root)
        try:
            if not self._follows_links and not file.resolve().is_relative_to(self._resolved_root):
                raise StillhouseError(f"{place}: is a link that leads out of {self.root}; copy the image into it")
            return file.read_bytes()
        except OSError as error:
            raise StillhouseError(
                f"{place}: cannot be read: {error.strerror}; give the image folder as stages.NAME.images"
            ) from error


class ImageSource(Protocol):
    """Loads images by sample and reference: one ImageFolder, or those of several caches, which need the index."""

    @property
    def processor(self) -> Any: ...

    def load_picture(self, image: ImageRef, *, sample_id: str, index: int | None = None) -> Picture: ...

    def load_pixels(self, image: ImageRef, *, sample_id: str, index: int | None = None) -> Tensor: ...

    def make_blank(self) -> Tensor: ...


class TensorStore:
    """Keeps tensors by name, up to a number of bytes. Evicts none: all are used equally often."""

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._tensors: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor | None:
        """Return the tensor of that name; None if it is not kept."""
        return self._tensors.get(name)

    def put(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Keep copies of the tensors that are new and fit into the remaining bytes."""
        for name, tensor in zip(names, tensors, strict=True):
            if name not in self._tensors and tensor.nbytes <= self._free_bytes:
                self._tensors[name] = tensor.detach().to("cpu", copy=True)
                self._free_bytes -= tensor.nbytes

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True, eq=False)
class VisionInput:
    """The images of a batch: known features of some, pixels of the others."""

    names: tuple[str, ...]  # sha256 of each image's file, i of them
    known: Float[Tensor, "k n f"] | None  # features of the frozen tower
    known_slots: Int[Tensor, " k"]  # the index of the image of each
    pixel_values: Float[Tensor, "p c h w"] | None  # one blank image, p = 1, for a batch without images
    pixel_slots: Int[Tensor, " p"]  # the index of the image of each; empty without images
    inputs: ModelInputs | None = None  # instead of the above, for a model called with its processor's output

    def to(self, device: torch.device) -> VisionInput:
        """Return the same input on another device."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | ModelInputs)
        }
        return replace(self, **moved)


class VisionGatherer:
    """Gathers a batch's images: features that are kept in memory, else pixels."""

    def __init__(self, folder: ImageSource, *, features: TensorStore | None, pixels: TensorStore) -> None:
        """`features`: of a frozen tower; None if the tower trains. `pixels`: decoded images worth keeping."""
        self._folder = folder
        self._features = features
        self._pixels = pixels

    def gather(self, samples: SampleBatch) -> VisionInput:
        """Return the vision input of all images of some samples, in order. Errors as ImageFolder.load_picture."""
        shown = zip(samples.images, samples.sample_ids, samples.indices.tolist(), strict=True)
        images = [(image, sample_id, index) for refs, sample_id, index in shown for image in refs]
        names, processor = tuple(image.sha256 for image, _, _ in images), self._folder.processor
        if isinstance(processor, ImageProcessorAdapter):
            pictures = [
                self._folder.load_picture(image, sample_id=sample_id, index=index) for image, sample_id, index in images
            ]
            nothing = torch.zeros(0, dtype=torch.int64)
            return VisionInput(names, None, nothing, None, nothing, processor.make_inputs(pictures))
        known: list[Tensor] = []
        known_slots, pixel_slots = [], []
        for slot, name in enumerate(names):
            features = self._features.get(name) if self._features is not None else None
            if features is None:
                pixel_slots.append(slot)
            else:
                known.append(features)
                known_slots.append(slot)
        wanted = [self._read(*images[slot]) for slot in pixel_slots]
        pixel_values = torch.stack(wanted) if wanted else None
        return VisionInput(
            names=names,
            known=torch.stack(known) if known else None,
            known_slots=torch.tensor(known_slots, dtype=torch.int64),
            pixel_values=pixel_values if images else self._folder.make_blank(),
            pixel_slots=torch.tensor(pixel_slots, dtype=torch.int64),
        )

    def _read(self, image: ImageRef, sample_id: str, index: int) -> Tensor:
        pixels = self._pixels.get(image.sha256)
        if pixels is None:
            pixels = self._folder.load_pixels(image, sample_id=sample_id, index=index)
            self._pixels.put([image.sha256], [pixels])
        return pixels
