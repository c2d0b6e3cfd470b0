"""A student after one training step is a standard checkpoint, on which transformers and vLLM agree."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from tests.student_train.conftest import ROOT, Runner

LOSSES = {"response": {}, "visual": {}, "relation": {"weight": 0.5}}
TOLERANCE = 2e-5  # of the largest logit, in float32


@pytest.mark.ci
@pytest.mark.slow
def test_vllm_serves_a_trained_student_with_the_same_logits(make_runner: Callable[..., Runner]) -> None:
    stage = {"losses": LOSSES, "steps": 1, "zero_stage": 2, "train": ["vision", "projector", "llm"]}
    runner = make_runner(dft=stage)
    (outcome,) = runner.run_in_turn(("dft",))
    assert outcome.code == 0, outcome.stderr
    trained = load_file(runner.output("dft") / "model.safetensors")
    untrained = load_file(f"{runner.document['stages']['dft']['init']}/model.safetensors")
    changed = {
        name.split(".")[0] for name in untrained if name in trained and not torch.equal(trained[name], untrained[name])
    }
    assert {"language_model", "multi_modal_projector"} <= changed
    command = [sys.executable, "-m", "tests.student_train.vllm_logits", str(runner.output("dft"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < TOLERANCE
