"""Recipes run whole on tiny stand-ins: only paths, sizes, steps and the teacher's backend are overridden."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.config import read_experiment
from storage.reader.cache import Cache
from tests.recipe_stand_ins import make_overrides

ROOT = Path(__file__).parents[1]
QUICK = "teacher_siglip_qwen2.5_3b"  # composes, and trains on a cache that needs neither teacher nor Ray
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
# Not among them yet, since nobody has seen them pass: a run was never finished on a machine that was free.
UNSEEN = [name for name in RECIPES if name.startswith(("llava_kd_", "qwen3_vl", "smolvlm2"))]
# The commands that a recipe's head names, one after another in one process, which imports everything once.
RUN = """
import json, sys, time
sys.path[0] = sys.argv[1]
from stillhouse.__main__ import main as stillhouse
from student_train.command import main as train
for verb, *arguments in json.loads(sys.argv[2]):
    code = train(arguments, started=time.monotonic()) if verb == "train" else stillhouse([verb, *arguments])
    if code:
        sys.exit(f"{verb} {arguments[:3]}: exit code {code}")
"""

RunRecipe = Callable[[str], Path]


@pytest.fixture(scope="module")
def run_recipe(tmp_path_factory: pytest.TempPathFactory) -> RunRecipe:
    """Runs a recipe once, after the one that makes its teacher; returns the folder of its last stage."""
    root = tmp_path_factory.mktemp("recipes")
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name in done:
            return done[name]
        path = ROOT / "recipes" / f"{name}.yaml"
        experiment = read_experiment(path)
        recipe = experiment.teacher.recipe
        overrides = make_overrides(experiment, root, teacher=None if recipe is None else run(Path(recipe).stem))
        commands = [["check", str(path), *overrides], ["dump", str(path), *overrides]]
        commands += [["dump", str(path), "--cache", Path(cache).name, *overrides] for cache in experiment.more_caches]
        commands += [["train", str(path), "--stage", stage, *overrides] for stage in experiment.stages]
        script = root / "run.py"
        script.write_text(RUN)
        finished = subprocess.run(
            [sys.executable, str(script), str(ROOT), json.dumps(commands)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, cwd=root,
            capture_output=True, text=True, timeout=1500, check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
        check_results(name, root)
        done[name] = root / "made" / name / list(experiment.stages)[-1]
        return done[name]

    return run


def check_results(name: str, root: Path) -> None:
    """Asserts that caches are sealed, with every family, and that each stage took two steps of finite loss."""
    experiment = read_experiment(ROOT / "recipes" / f"{name}.yaml", [f"runs_dir={root / 'runs'}"])
    for path in (experiment.cache.path, *experiment.more_caches):
        cache = Cache.open(path, families=())
        assert cache.sealed
        assert cache.num_samples > 0
    assert set(experiment.cache.families) <= set(Cache.open(experiment.cache.path, families=()).families)
    for stage in experiment.stages:
        folder = root / "made" / name / stage
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert losses
        assert all(math.isfinite(loss) for loss in losses)
        assert (folder / "config.json").is_file()
        assert list(folder.glob("*.safetensors"))


def test_the_recipe_of_a_teacher_runs_whole(run_recipe: RunRecipe) -> None:
    run_recipe(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in (QUICK, *UNSEEN)])
def test_recipes_run_whole(run_recipe: RunRecipe, name: str) -> None:
    run_recipe(name)
