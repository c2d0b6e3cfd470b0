"""A change of structure leaves every stage's curve as it was; the script renews what a change of meaning moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.loss_curves import GOLDEN, make_material, train


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curves")
    make_material(folder)
    return folder


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=[pytest.mark.ci, pytest.mark.slow])])
def test_every_stage_follows_its_golden_curve(material: Path, num_ranks: int) -> None:
    curves = train(material, num_ranks=num_ranks)
    golden = json.loads(GOLDEN.read_text())[f"ranks_{num_ranks}"]
    assert curves.keys() == golden.keys()
    for stage, measures in curves.items():
        for measure, values in measures.items():
            assert values == pytest.approx(golden[stage][measure], rel=1e-4), (stage, measure)
