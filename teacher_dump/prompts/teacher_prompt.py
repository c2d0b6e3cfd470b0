"""The input of a teacher: token ids and images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.images.pixels import Picture


@dataclass(frozen=True, eq=False)
class TeacherPrompt:
    """Unexpanded token ids, one image token per image, and the images in that order."""

    token_ids: NDArray[np.int32]
    images: tuple[Picture, ...]
    image_keys: tuple[str, ...] = ()  # each image's content hash; without them it shares nothing with other prompts
    # (t,) True for answers, of a prompt with answers: some models let tokens before the answer see each other
    response_mask: NDArray[np.bool_] | None = None
