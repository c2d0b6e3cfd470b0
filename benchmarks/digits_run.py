"""A run of the digits experiment to measure on: that of `make demo` where it is, else one made here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

DEMO = Path("runs/digits")
SHORT_STEPS = 250  # of a teacher made in short: some 85 % right instead of 93 %
_ARGUMENTS = (  # those of pipeline.yaml
    "--noise", "0.5", "--mosaics", "1000", "--test-mosaics", "250", "--teacher-mosaics", "3500", "--tower-steps", "600",
    "--students", "5",
)  # fmt: skip


def digits_run(demo: Path, *, teacher_steps: int, report: Callable[[str], None]) -> Path:
    """A folder with a trained teacher, its training cache, five untrained students, and `cache`: tokens at least."""
    if (demo / "models/teacher/evaluation.json").exists() and (demo / "cache/manifest.json").exists():
        return demo
    run = Path(f"runs/bench_digits_{teacher_steps}")
    if not (run / "cache/manifest.json").exists():
        report(f"digits: no run in {demo}; making one in {run}, its teacher trained for {teacher_steps} steps")
        _make(run, teacher_steps)
    return run


def _make(run: Path, teacher_steps: int) -> None:
    place = f"runs_dir={run.parent}", f"name={run.name}"
    source = f'[{{"path": "{run}/data/teacher_train.jsonl", "split": "train"}}]'
    dump = ("-m", "stillhouse", "dump", *place, "cache.families=[]")
    for command in (
        ("examples/digits/make.py", "--out", str(run), *_ARGUMENTS),
        (*dump, f"cache.path={run}/data/teacher_cache", f"data.sources={source}",
         f"teacher.model={run}/models/teacher_init"),
        ("-m", "stillhouse", "train", "--stage", "teacher", *place, f"stages.teacher.steps={teacher_steps}"),
        (*dump, f"teacher.model={run}/models/teacher_init"),
    ):  # fmt: skip
        done = subprocess.run([sys.executable, *command], check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")
