"""Loads a teacher's transformers processor, on any machine."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from storage.errors import StillhouseError
from storage.images.settings import BACKEND
from storage.processes import torchvision_shim


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads the processor of a checkpoint, or its tokenizer if it takes no images.

    Images are resized with the library that every student uses, whatever else is installed.
    """
    torchvision_shim.import_torch_companions()
    keep_videos_loadable()
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code, backend=BACKEND)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise StillhouseError(f"{folder}: its processor or tokenizer cannot be loaded: {error}") from error


def keep_videos_loadable() -> None:
    """Makes processors with a video part loadable with Pillow as the backend of their images.

    transformers passes one `backend` to all parts of a processor, and refuses "pil" for the video part.
    vLLM calls this in each of its processes (pyproject.toml, vllm.general_plugins), since workers load processors.
    """
    mapping = importlib.import_module("transformers.models.auto.video_processing_auto").VIDEO_PROCESSOR_MAPPING_NAMES
    for classes in mapping.values():
        classes.setdefault(BACKEND, classes.get("torchvision"))
