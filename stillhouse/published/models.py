"""Published models: sizes and licences by Hub id (models.yaml)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml


@dataclass(frozen=True)
class PublishedModel:
    """What is published of a model. Sizes are of bf16 weights unless `note` says otherwise."""

    billions: float  # parameters; of a tower that is named alone, the vision part's
    gigabytes: float  # of the files
    hidden: int  # of the decoder, or of the tower
    licence: str
    visual_tokens: int = 0  # of an image; where they depend on its size, of 640 x 480 pixels
    note: str = ""


@lru_cache(maxsize=1)
def load_published_models() -> dict[str, PublishedModel]:
    """Returns every published model that is known, by its Hub id."""
    text = Path(__file__).with_name("models.yaml").read_text(encoding="utf-8")
    return {name: PublishedModel(**fields) for name, fields in yaml.safe_load(text).items()}


def describe_download(name: str) -> str:
    """Returns size and licence of a Hub model as text; says so where they are not known."""
    model = load_published_models().get(name)
    if model is None:
        return "size and licence are not known to this version"
    note = f" ({model.note})" if model.note else ""
    return f"{model.gigabytes:g} GB{note}, licence: {model.licence}"
