from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from storage.processes import torchvision_shim

REPOSITORY = Path(__file__).parents[3]
WORKING = "import torch\ndef nms(*_):\n    return 'the real one'\n"


FAKE_TORCH = "defined = set()\n"
FAKE_LIBRARY = "import torch\ndef define(name, schema):\n    torch.defined.add(name)\n"
NEEDS_OPERATORS = (
    "import torch\n"
    "if torch.defined != {'torchvision::nms', 'torchvision::qnms'}:\n"
    "    raise RuntimeError('operator torchvision::nms does not exist')\n"
    "ready = True\n"
)


def run(code: str, folder: Path) -> str:
    """Runs a Python without the environment's own repair (a .pth file; `-S` reads none), returns its output."""
    paths = [str(folder), str(REPOSITORY), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def fake(folder: Path, package: str, code: str) -> Path:
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(code, encoding="utf-8")
    if code is FAKE_TORCH:
        (folder / package / "library.py").write_text(FAKE_LIBRARY, encoding="utf-8")
    return folder


def test_transformers_finds_its_models_after_the_hook() -> None:
    torchvision_shim.import_torch_companions()
    torchvision_shim.import_torch_companions()
    from transformers import LlavaForConditionalGeneration, SiglipImageProcessor

    assert LlavaForConditionalGeneration is not None
    assert SiglipImageProcessor is not None


def test_matching_wheels_are_left_alone(tmp_path: Path) -> None:
    fake(tmp_path, "torchvision", WORKING)
    fake(tmp_path, "torchaudio", "loaded = True\n")
    code = (
        "from storage.processes import torchvision_shim; torchvision_shim.import_torch_companions()\n"
        "import torch, torchvision, torchaudio\n"
        "print(torchvision.nms(), torchaudio.loaded, torch._C._dispatch_has_kernel('torchvision::nms'))"
    )
    assert run(code, tmp_path) == "the real one True False"


def test_missing_operators_are_defined_and_a_dead_torchaudio_hidden(tmp_path: Path) -> None:
    fake(
        tmp_path,
        "torchvision",
        "import torch\ntorch.library.register_fake('torchvision::nms')(lambda *a: None)\n",
    )
    fake(tmp_path, "torchaudio", "raise OSError('Could not load this library: torchaudio/lib/x.so')\n")
    code = (
        "from storage.processes import torchvision_shim; torchvision_shim.import_torch_companions()\n"
        "import importlib.util, torch, torchvision\n"
        "print(torch.ops.torchvision.nms.default._schema, importlib.util.find_spec('torchaudio'))"
    )
    expected = "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor None"
    assert run(code, tmp_path) == expected


def test_other_failures_are_not_hidden(tmp_path: Path) -> None:
    fake(tmp_path, "torchvision", "raise RuntimeError('something else')\n")
    code = "from storage.processes import torchvision_shim; torchvision_shim.import_torch_companions()"
    assert run(code, tmp_path) == "RuntimeError: something else"


@pytest.mark.parametrize(
    "error", ["RuntimeError('no ffmpeg')", "ImportError('undefined symbol')", "OSError('libx.so')"]
)
def test_a_torchcodec_that_cannot_load_is_hidden_whatever_it_raises(tmp_path: Path, error: str) -> None:
    for package in ("torchvision", "torchaudio"):
        fake(tmp_path, package, "")
    fake(tmp_path, "torchcodec", f"raise {error}\n")
    code = (
        "from storage.processes import torchvision_shim; torchvision_shim.import_torch_companions()\n"
        "import importlib.util; print(importlib.util.find_spec('torchcodec'), 'torchaudio' in sys.modules)"
    )
    assert run(code, tmp_path) == "None True"


def test_the_hook_alone_is_enough(tmp_path: Path) -> None:
    fake(tmp_path, "torchvision", NEEDS_OPERATORS)
    fake(tmp_path, "torch", FAKE_TORCH)
    code = "from storage.processes import torchvision_shim; torchvision_shim.install()\nimport torchvision\n"
    assert run(code + "print(torchvision.ready)", tmp_path) == "True"
    assert run("import torchvision", tmp_path) == "RuntimeError: operator torchvision::nms does not exist"


def test_missing_packages_are_ignored(tmp_path: Path) -> None:
    for package in ("torchvision", "torchaudio"):
        fake(tmp_path, package, f"raise ModuleNotFoundError('no', name={package!r})\n")
    code = "from storage.processes import torchvision_shim; torchvision_shim.import_torch_companions(); print('well')"
    assert run(code, tmp_path) == "well"
