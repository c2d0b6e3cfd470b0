"""Loss curves that a change of the code's structure must reproduce: sft, dft, dense-to-sparse and preference.

Each stage trains 30 steps in one thread, on one rank and on two, from seeded random models and seeded caches.

    python -m tests.golden.loss_curves                    # print this checkout's curves as JSON
    python -m tests.golden.loss_curves --write            # renew loss_curves.json
    python -m tests.golden.loss_curves --compare COMMIT   # with COMMIT's curves on this machine: equal to the bit?

Across machines, whose kernels sum in another order, curves agree to a relative 1e-4: test_loss_curves.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_suffix(".json")
NUM_STEPS = 30
MEASURED = ("loss", "grad_norm")
COMMON: dict[str, Any] = {
    "output": "{run}/{stage}", "steps": NUM_STEPS, "global_batch": 6, "micro_batch": 3, "lr": 1e-3,
    "precision": "fp32", "log_every": 1, "zero_stage": 2,
}  # fmt: skip
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"losses": {"cross_entropy": 1.0}},
    "dft": {"losses": {"response": {}, "visual": {"weight": 0.5}, "relation": {"weight": 0.5}}},
    "d2s": {
        "cache": "pairs", "moe": {"experts": 4, "top_k": 2, "every": 2}, "train": ["projector", "mlp"],
        "losses": {"response": {}, "balance": {}},
    },
    "preference": {
        "cache": "pairs", "init": "{run}/d2s", "train": ["projector", "mlp"],
        "losses": {"cross_entropy": 0, "preference": {"kl_reference": "global"}, "balance": {}},
    },
}  # fmt: skip
TRAIN = """
import json, sys, time
root, config, stages = sys.argv[1:]
sys.path[0] = root
from student_train.command import main
for stage in json.loads(stages):
    code = main([config, "--stage", stage], started=time.monotonic())
    if code:
        sys.exit(code)
"""
Curves = dict[str, dict[str, list[float]]]


def make_material(folder: Path) -> None:
    """A student, a cache of answers, visual rows and relation matrices, and a cache of preference pairs."""
    from tests.student_train.caches import make_cache
    from tests.tiny import make_tiny_llava

    student = make_tiny_llava(folder / "student", num_layers=2)
    make_cache(folder / "answers", student)
    make_cache(folder / "pairs", student, num_samples=16, families=("response", "sequence"), tau=0.02)


def train(folder: Path, *, num_ranks: int) -> Curves:
    """Each stage's loss and gradient norm by step, of the material in `folder`."""
    name = f"ranks_{num_ranks}"
    stages = {
        stage: {
            "init": str(folder / "student"), **COMMON, **fields,
            "cache": str(folder / fields.get("cache", "answers") / "cache"),
        }
        for stage, fields in STAGES.items()
    }  # fmt: skip
    config, script = folder / f"{name}.yaml", folder / "train.py"
    document = {"name": name, "runs_dir": str(folder / "runs"), "cache": stages["sft"]["cache"], "stages": stages}
    config.write_text(yaml.safe_dump({**document, "cache": {"path": stages["sft"]["cache"]}}))
    script.write_text(TRAIN)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    launcher = torchrun if num_ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(ROOT), str(config), json.dumps(list(stages))],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name} ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    return {stage: _read(folder / "runs" / name / stage / "metrics.jsonl") for stage in STAGES}


def _read(path: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {measure: [line[measure] for line in lines] for measure in MEASURED}


def make_curves() -> dict[str, Curves]:
    """The curves of this checkout, on one rank and on two."""
    with tempfile.TemporaryDirectory() as folder:
        make_material(Path(folder))
        return {f"ranks_{count}": train(Path(folder), num_ranks=count) for count in (1, 2)}


@contextlib.contextmanager
def _checkout(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def curves_of(commit: str) -> dict[str, Curves]:
    """The curves that the code of another commit, which has this module, gives on this machine."""
    with _checkout(commit) as tree:
        done = subprocess.run(
            [sys.executable, "-m", "tests.golden.loss_curves"],
            cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Print, renew or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"renew {GOLDEN.name}")
    parser.add_argument("--compare", metavar="COMMIT", help="compare with the curves of that commit, to the bit")
    options = parser.parse_args()
    curves = make_curves()
    if options.write:
        GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
    elif options.compare:
        differing = [
            f"{ranks} {stage}"
            for ranks, stages in curves_of(options.compare).items()
            for stage, curve in stages.items()
            if curve != curves[ranks][stage]
        ]
        sys.stdout.write(
            f"{options.compare}: {'differ: ' + ', '.join(differing) if differing else 'equal to the bit'}\n"
        )
        return int(bool(differing))
    else:
        sys.stdout.write(json.dumps(curves) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
