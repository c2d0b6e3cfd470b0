"""Images of a cache: read below one root or from the cache itself, checked against their sha256, made into
pixels; features kept.

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
from student_train.data.image_inputs import ImageInputs, ModelInputs


def open_images(cache: Cache, configured: str | None, processor: Any) -> ImageFolder:
    """The images that a cache's samples show: of the configured folder, or of the one that the cache names.

    That one may have moved together with the cache. Where none is configured and it is not here, they come out
    of the cache if it holds them.
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
    """The images below a root, as the student's own preprocessing shows them to its vision tower."""

    def __init__(
        self,
        root: str | Path,
        processor: Any,
        *,
        pixels: PixelSettings,
        cache: Cache | None = None,
        follows_links: bool = True,
    ) -> None:
        """`processor`: a transformers image processor that makes every image equally large, or ImageInputs.

        `pixels`: how a file's bytes become pixels. `cache`: holds the files, which are then not looked for below the
        root. `follows_links`: also to where they lead out of the root, as links of a folder of this machine may.
        """
        self._follows_links = follows_links
        self._cache = cache
        self._settings = pixels
        self.root = Path(root)
        self._resolved_root = self.root.resolve()
        self.processor = processor

    def pixels(self, image: ImageRef, *, sample_id: str) -> Float[Tensor, "c h w"]:
        """One image, ready for the tower. Errors as `picture`."""
        return self._processed(self.picture(image, sample_id=sample_id))

    def picture(self, image: ImageRef, *, sample_id: str) -> Picture:
        """One image in RGB.

        Errors: StillhouseError naming sample and file, for a file that is missing, lies outside of the root,
        is not the one that the teacher saw, or is no image. CorruptPartError of the cache.
        """
        place = f"sample {sample_id!r}: image {self.root / image.path}"
        if self._cache is not None:
            content = self._cache.image_bytes(self._cache.index_of(sample_id), image.sha256)
        else:
            content = self._content(image, place)
        got = hashlib.sha256(content).hexdigest()
        if got != image.sha256:
            raise StillhouseError(
                f"{place}: sha256 is {got[:12]}…, the cache was made from {image.sha256[:12]}…; "
                "give the folder of the original images, or dump again"
            )
        try:
            return make_pixels(content, self._settings)
        except ImageDecodeError as error:
            raise StillhouseError(f"{place}: cannot be decoded: {error}") from error

    def blank(self) -> Float[Tensor, "1 c h w"]:
        """A black image, for a batch without images: parameters then get a gradient (of 0) on every rank."""
        return self._processed(make_blank_picture((32, 32)))[None]

    def _processed(self, picture: Picture) -> Float[Tensor, "c h w"]:
        return self.processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def _content(self, image: ImageRef, place: str) -> bytes:
        file = image.file(self.root)
        try:
            if not self._follows_links and not file.resolve().is_relative_to(self._resolved_root):
                raise StillhouseError(f"{place}: leads out of {self.root}; copy the image into it")
            return file.read_bytes()
        except OSError as error:
            raise StillhouseError(
                f"{place}: cannot be read: {error.strerror}; give the image folder as stages.NAME.images"
            ) from error


class Pictures(Protocol):
    """Where images are found, by sample and reference: one ImageFolder, or those of several caches."""

    @property
    def processor(self) -> Any: ...

    def picture(self, image: ImageRef, *, sample_id: str) -> Picture: ...

    def pixels(self, image: ImageRef, *, sample_id: str) -> Tensor: ...

    def blank(self) -> Tensor: ...


class FeatureStore:
    """Tensors by name, up to a number of bytes. What came first stays: all are wanted equally often."""

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._tensors: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, if it is kept."""
        return self._tensors.get(name)

    def put(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Keep copies of those that are new and fit."""
        for name, tensor in zip(names, tensors, strict=True):
            if name not in self._tensors and tensor.nbytes <= self._free_bytes:
                self._tensors[name] = tensor.detach().to("cpu", copy=True)
                self._free_bytes -= tensor.nbytes

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True, eq=False)
class VisionInput:
    """What fills the visual positions of a batch: known features, and the pixels of the other images."""

    names: tuple[str, ...]  # sha256 of each image's file, i of them
    known: Float[Tensor, "k n f"] | None  # features of the frozen tower
    known_slots: Int[Tensor, " k"]  # which image each of them is
    pixel_values: Float[Tensor, "p c h w"] | None  # without any image: one blank image, p = 1
    pixel_slots: Int[Tensor, " p"]  # which image each of them is; empty without any image
    inputs: ModelInputs | None = None  # in place of all that: of a model that is called with its processor's output

    def to(self, device: torch.device) -> VisionInput:
        """The same on another device."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | ModelInputs)
        }
        return replace(self, **moved)


class VisionSource:
    """Gathers a batch's images: from the features kept in memory if there is a store, else as pixels."""

    def __init__(self, folder: Pictures, *, features: FeatureStore | None, pixels: FeatureStore) -> None:
        """`features`: of a frozen tower; None if the tower trains. `pixels`: decoded images worth keeping."""
        self._folder = folder
        self._features = features
        self._pixels = pixels

    def gather(self, images: Sequence[tuple[str, ImageRef]]) -> VisionInput:
        """The input for (sample id, image) pairs. Errors as ImageFolder.picture."""
        processor = self._folder.processor
        if isinstance(processor, ImageInputs):
            pictures = [self._folder.picture(image, sample_id=sample_id) for sample_id, image in images]
            nothing = torch.zeros(0, dtype=torch.int64)
            names = tuple(image.sha256 for _, image in images)
            return VisionInput(names, None, nothing, None, nothing, processor.of(pictures))
        known: list[Tensor] = []
        known_slots, pixel_slots = [], []
        for slot, (_, image) in enumerate(images):
            features = self._features.get(image.sha256) if self._features is not None else None
            if features is None:
                pixel_slots.append(slot)
            else:
                known.append(features)
                known_slots.append(slot)
        wanted = [self._read(*images[slot]) for slot in pixel_slots]
        pixel_values = torch.stack(wanted) if wanted else None
        return VisionInput(
            names=tuple(image.sha256 for _, image in images),
            known=torch.stack(known) if known else None,
            known_slots=torch.tensor(known_slots, dtype=torch.int64),
            pixel_values=pixel_values if images else self._folder.blank(),
            pixel_slots=torch.tensor(pixel_slots, dtype=torch.int64),
        )

    def _read(self, sample_id: str, image: ImageRef) -> Tensor:
        pixels = self._pixels.get(image.sha256)
        if pixels is None:
            pixels = self._folder.pixels(image, sample_id=sample_id)
            self._pixels.put([image.sha256], [pixels])
        return pixels
