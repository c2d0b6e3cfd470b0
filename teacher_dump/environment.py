"""`python -m teacher_dump.environment` makes transformers and vLLM importable in every Python of this environment.

If torchvision, torchaudio or torchcodec is installed but cannot be imported, a `.pth` file in site-packages
installs the hook of torchvision_shim at each start. So processes that never import this package have it too:
vLLM's and Ray's children, a user's own scripts. It adds less than a millisecond to a start. The command
removes the file once all three packages can be imported.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from storage.processes import torchvision_shim

_PACKAGES = ("torchvision", *torchvision_shim.AUDIO_PACKAGES)
_COPY = "stillhouse_torch_companions"  # the shim's name in site-packages, where it outlives a removed Stillhouse
# One line, since `site` reads a .pth file line by line. Without the copy it does nothing.
_PTH = (
    'import sys; exec("try:\\n    import {copy}\\nexcept ImportError:\\n    pass\\n'
    'else:\\n    {copy}.install(hidden={hidden!r})")\n'
)
# Tries an import as if there were no hook. -I keeps the current folder and PYTHONPATH out.
_TRIAL = (
    "import importlib, sys; name = sys.argv[1]; sys.modules.pop(name, None); "
    "sys.meta_path[:] = [finder for finder in sys.meta_path if not hasattr(finder, 'repairs_torchvision')]; "
    "importlib.import_module(name)"
)


def repair_environment() -> str:
    """Writes the `.pth` file if a companion of torch cannot be imported, else removes it; returns a report."""
    folder = Path(sysconfig.get_path("purelib"))
    pth, copy = folder / f"{_COPY}.pth", folder / f"{_COPY}.py"
    failed = []
    for name in _PACKAGES:
        trial = [sys.executable, "-I", "-c", _TRIAL, name]
        done = subprocess.run(trial, capture_output=True, text=True, check=False)
        if done.returncode and f"No module named '{name}'" not in done.stderr:
            failed.append(name)
    if not failed:
        pth.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)
        return "torchvision, torchaudio and torchcodec can be imported, or are not installed: nothing to do"
    hidden = tuple(name for name in failed if name in torchvision_shim.AUDIO_PACKAGES)
    copy.write_bytes(Path(torchvision_shim.__file__).read_bytes())
    pth.write_text(_PTH.format(copy=_COPY, hidden=hidden), encoding="utf-8")
    done_to = [f"hides {name}" if name in hidden else f"repairs {name}" for name in failed]
    return f"{pth}: {', '.join(done_to)} in every Python of this environment"


def main(arguments: list[str]) -> int:
    """Repairs the environment, prints a report and returns the exit code."""
    if arguments:
        sys.stderr.write(f"unexpected argument {arguments[0]!r}; usage: python -m teacher_dump.environment\n")
        return 2
    try:
        sys.stdout.write(f"{repair_environment()}\n")
    except OSError as error:
        sys.stderr.write(f"{error.filename}: cannot be written: {error.strerror}; run it as the environment's owner\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
