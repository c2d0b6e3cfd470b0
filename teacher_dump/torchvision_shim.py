"""Makes transformers and vLLM importable where torch is a `+cpu` build and its companions come from PyPI.

PyPI's torchvision and torchaudio carry CUDA extensions. Beside a CPU build of torch the extensions do not load:
torchvision then fails on two operators that nobody has defined, torchaudio fails outright. transformers imports
both for every model class. With matching wheels `ensure` changes nothing.
"""

from __future__ import annotations

import importlib
import sys

_OPERATORS = {  # as declared in torchvision/csrc/ops/nms.cpp and ops/quantized/cpu/qnms_kernel.cpp
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def ensure() -> None:
    """Import torchvision and torchaudio where they are installed, repairing exactly the failures named above.

    torchvision's missing operators get a schema and no kernel: calling one fails.
    A torchaudio whose extension cannot load is hidden, as if it were not installed; nothing here hears sound.
    Any other failure is raised as it came.
    """
    _ensure_torchvision()
    _ensure_torchaudio()


def _ensure_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _forget("torchvision")
        library = importlib.import_module("torch.library")
        for name, schema in _OPERATORS.items():
            library.define(f"torchvision::{name}", schema)
        importlib.import_module("torchvision")


def _ensure_torchaudio() -> None:
    try:
        importlib.import_module("torchaudio")
    except ModuleNotFoundError as error:
        if error.name != "torchaudio":
            raise
    except OSError as error:
        if "torchaudio" not in str(error):
            raise
        _forget("torchaudio")
        sys.modules["torchaudio"] = None  # type: ignore[assignment]  # Python's own way to bar an import
        if (loaded := sys.modules.get("transformers.utils.import_utils")) is not None:
            loaded.is_torchaudio_available.cache_clear()  # it may have looked before


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
