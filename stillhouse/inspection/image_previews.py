"""Makes data URIs for a self-contained page: the data set's images in small, matrices as heat maps."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from storage.images import pixels as image_pixels
from storage.images.pictures import encode_picture, make_picture, shrink_picture
from storage.images.settings import PixelSettings
from storage.records.records import ImageRef

MAX_FILE_BYTES = 64 << 20  # a larger file is not opened
MAX_PIXELS = 50_000_000  # a larger image is not decoded
MAX_SIDE = 512  # pixels that are embedded
MAX_LOSSLESS_SIDE = 256  # up to here as PNG, larger ones as JPEG
CLIPPED_FRACTION = 0.005  # of a matrix's values at each end, or a bright diagonal would leave the rest pale
MAX_SMALL_HEAT_SIDE = 100
MAX_HEAT_SIDE = 512  # a larger matrix is shown by every n-th row and column


@dataclass(frozen=True)
class ImagePreview:
    """An image to embed. Without a uri, `reason` says why it is not shown."""

    uri: str
    width: int = 0  # of the original, in pixels
    height: int = 0
    reason: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A matrix as an image of one pixel a value. Values outside `low` to `high` have the outermost colours."""

    uri: str
    low: float
    high: float
    gradient: str  # CSS, from low to high
    clipped: bool  # some values lie outside
    step: int  # every step-th row and column is shown
    is_large: bool  # more than MAX_SMALL_HEAT_SIDE pixels a side


def embed_image(
    root: Path,
    image: ImageRef,
    *,
    pixels: PixelSettings,
    max_file_bytes: int = MAX_FILE_BYTES,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    max_lossless_side: int = MAX_LOSSLESS_SIDE,
    follows_links: bool = False,
) -> ImagePreview:
    """The image below `root`, with pixels made as the teacher's were. Gives a reason in place of an error.

    Only the file that the teacher saw is shown. What is embedded is our own encoding of its pixels, so nothing
    hidden in the file reaches the page.
    """
    file = image.file(root)
    try:
        if not follows_links and not file.resolve().is_relative_to(root.resolve()):
            return ImagePreview("", reason="it leads out of the image root")
        if file.stat().st_size > max_file_bytes:
            return ImagePreview("", reason=f"its file has more than {max_file_bytes:,} bytes")
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != image.sha256:
            return ImagePreview("", reason="the file there is not the image that the teacher saw (another sha256)")
        picture = image_pixels.make_pixels(content, pixels, max_pixels=max_pixels)
    except OSError as error:
        reason = f"not found below {root}" if isinstance(error, FileNotFoundError) else str(error)
        return ImagePreview("", reason=reason)
    except image_pixels.ImageDecodeError as error:
        return ImagePreview("", reason=f"cannot be decoded: {error}")
    width, height = picture.size
    small = shrink_picture(picture, max_side)
    kind = "png" if max(small.size) <= max_lossless_side else "jpeg"
    return ImagePreview(_encode_uri(small, kind), width, height)


def draw_heat_map(values: NDArray[np.floating], *, like: NDArray[np.floating] | None = None) -> HeatMap:
    """Colours of a matrix (n, m): from low to high values, or symmetric around 0 if it has both signs.

    With `like`, in the colours of that matrix, so that both can be compared.
    """
    scale = values if like is None else like
    step = -(-max(values.shape) // MAX_HEAT_SIDE)
    shown = values[::step, ::step].astype(np.float64)
    low = float(np.quantile(scale, CLIPPED_FRACTION, method="lower"))
    high = float(np.quantile(scale, 1 - CLIPPED_FRACTION, method="higher"))
    palette = "magma_r"
    if low < 0 < high:
        high = max(-low, high)
        low, palette = -high, "RdBu_r"
    colours = mpl.colormaps[palette]
    span = high - low
    fractions = np.clip((shown - low) / span, 0, 1) if span > 0 else np.zeros_like(shown)
    pixels = (colours(fractions)[..., :3] * 255).astype(np.uint8)
    stops = ", ".join(to_hex(colours(fraction)) for fraction in np.linspace(0, 1, 9))
    is_large = max(shown.shape) > MAX_SMALL_HEAT_SIDE
    clipped = bool(values.min() < low or values.max() > high)
    uri = _encode_uri(make_picture(pixels), "png")
    return HeatMap(uri, low, high, f"linear-gradient(90deg, {stops})", clipped, step, is_large)


def _encode_uri(picture: image_pixels.Picture, kind: Literal["png", "jpeg"]) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(encode_picture(picture, kind)).decode()}"
