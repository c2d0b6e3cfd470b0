"""How a processor marks an image's place in a text, and which separators it writes around an image's visual tokens.

Most processors replace one visual token by the image's whole run, with separators that are tokens of their own. Two
kinds need care, so that token ids are those of the model's own processor:

- Gemma 3's template writes `<start_of_image>`, for which its processor writes line breaks, separators and the visual
  tokens. Line breaks join with neighbouring ones in the tokenizer, so they are written before a text is tokenised,
  and an image then stands for its visual tokens alone.
- PaliGemma's processor writes a `<bos>` and a line break after the last image of a prompt, which a chat template
  writes itself.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import StillhouseError

_WRITES_A_PROMPT = ("PaliGemmaProcessor",)


def get_placeholder(processor: Any, image_token: str) -> str:
    """Returns the text that a processor replaces by an image's tokens; `image_token` is the model's visual token."""
    return str(processor.image_token) if _has_own_placeholder(processor, image_token) else image_token


def write_visual_tokens(text: str, processor: Any) -> str:
    """Replaces each placeholder of a rendered text by one visual token between the processor's separators.

    Returns the text unchanged if the processor's placeholder is the visual token itself.
    """
    image_token = getattr(getattr(processor, "tokenizer", None), "image_token", None)
    if image_token is None or not _has_own_placeholder(processor, image_token):
        return text
    run = re.sub(f"(?:{re.escape(image_token)})+", lambda _: image_token, processor.full_image_sequence)
    return text.replace(str(processor.image_token), run)


def keep_image_ids(
    ids: NDArray[np.int64], processor: Any, *, image_token: str, image_token_id: int
) -> NDArray[np.int64]:
    """Returns the ids of one image's tokens, out of a processor's ids for its placeholder alone.

    Raises StillhouseError if the processor adds crops between texts of their own, which a template cannot write.
    """
    if not (_has_own_placeholder(processor, image_token) or type(processor).__name__ in _WRITES_A_PROMPT):
        return ids
    places = np.flatnonzero(ids == image_token_id)
    if len(places) and places[-1] - places[0] >= len(places):
        raise StillhouseError(
            f"{type(processor).__name__} adds crops of an image (pan and scan) between texts of its own, which is not "
            "supported; set do_pan_and_scan to false in a copy of the checkpoint's preprocessor_config.json"
        )
    return ids[places]


def _has_own_placeholder(processor: Any, image_token: str) -> bool:
    placeholder = getattr(processor, "image_token", image_token)
    return placeholder != image_token and hasattr(processor, "full_image_sequence")
