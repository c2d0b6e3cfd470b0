"""Makes transformers and vLLM importable where torch is a `+cpu` build and its companions come from PyPI.

PyPI's torchvision and torchaudio carry CUDA extensions, which do not load beside a CPU build of torch: torchvision
then fails on two operators that nobody has defined, torchaudio fails outright, and so does a torchcodec that finds no
ffmpeg. transformers and vLLM import all three wherever they are installed. With wheels that load, nothing here acts.

`install` adds an import hook to this process, which repairs torchvision if its import fails. A teacher does that before
it imports transformers or vLLM, and so does a student, since timm needs torchvision;
`python -m teacher_dump.environment` does it for every Python of an environment, by a copy of this file in
site-packages. So it must import nothing but what every start of Python imports.
"""

from __future__ import annotations

import importlib
import sys

_OPERATORS = {  # as declared in torchvision/csrc/ops/nms.cpp and ops/quantized/cpu/qnms_kernel.cpp
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
AUDIO_PACKAGES = ("torchaudio", "torchcodec")  # Stillhouse does not use them


class _Finder:
    """Finds torchvision as the other finders do, and gives it a loader that repairs it."""

    repairs_torchvision = True

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # a Loader by its methods
                return spec
        return None


class _Loader:
    """torchvision's own loader; when its import fails for want of an operator, defines the operators and repeats it."""

    def __init__(self, loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        try:
            self._loader.exec_module(module)
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            _remove_modules("torchvision.")
            library = importlib.import_module("torch.library")
            for name, schema in _OPERATORS.items():
                library.define(f"torchvision::{name}", schema)
            self._loader.exec_module(module)


def install(*, hidden: tuple[str, ...] = ()) -> None:
    """Adds the hook to this process, once, and makes packages in `hidden` look as if not installed.

    torchvision's missing operators get a schema and no kernel: calling one fails.
    """
    if not any(hasattr(finder, "repairs_torchvision") for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in hidden:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # Python's own way to bar an import


def import_torch_companions() -> None:
    """Imports torchvision, torchaudio and torchcodec if installed; hides the latter two if they fail to load.

    A torchvision that cannot be repaired raises its own error.
    """
    install()
    _import_if_installed("torchvision")
    for name in AUDIO_PACKAGES:
        if name in sys.modules:
            continue
        try:
            _import_if_installed(name)
        except Exception:  # of whatever kind: OSError, RuntimeError and ImportError have been seen
            _remove_modules(name)
            sys.modules[name] = None  # type: ignore[assignment]
            if (loaded := sys.modules.get("transformers.utils.import_utils")) is not None:
                getattr(loaded, f"is_{name}_available").cache_clear()  # it may have looked before


def _import_if_installed(package: str) -> None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise


def _remove_modules(prefix: str) -> None:
    for name in [name for name in sys.modules if f"{name}.".startswith(prefix) and name != prefix.rstrip(".")]:
        del sys.modules[name]
