"""Which layers a stage prunes is measured on samples of its cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from storage.errors import IdentityError, StillhouseError
from student_train.config import StageSection
from student_train.data.collate import collate
from student_train.data.sample_images import TensorStore, VisionGatherer
from student_train.models.huggingface import load_weights
from student_train.models.loading import read_checkpoint
from student_train.models.student import Student
from student_train.training.layer_change import LayerChange
from student_train.training.stage_data import open_mixture
from student_train.training.stage_inputs import collect_init_inputs
from tests.student_train.conftest import Runner
from tests.tiny import SPECIAL_TOKENS, make_tiny_llava, make_tiny_tokenizer


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of four layers, of which 1 and 2 do nothing."""
    folder = make_tiny_llava(tmp_path_factory.mktemp("deep") / "llava", num_layers=4)
    model = load_weights(folder)
    with torch.no_grad():
        for number in (1, 2):
            layer = model.model.language_model.layers[number]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


def make_change(deep: Path, cache: Path, **fields: object) -> LayerChange:
    prune = {"model": str(deep), "layers": 2, "choose": "least_change", "slice": 10, **fields}
    stage = StageSection.model_validate({"init": "pruned", "steps": 1, "micro_batch": 4, "prune": prune})
    assert stage.prune is not None
    return LayerChange(stage, stage.prune, str(cache))


def test_the_change_is_that_of_single_samples_without_padding(deep: Path, cache: Path) -> None:
    change = make_change(deep, cache)
    model = load_weights(deep)
    measured = change.measure(model, model.model.language_model.layers)
    checkpoint, data = read_checkpoint(deep), open_mixture(change.stage, str(cache))
    student = Student(model, vocab_size=300, image_token_id=checkpoint.sequence_format.image_token_id, features=None)
    vision = VisionGatherer(data.images(checkpoint.image_processor), features=None, pixels=TensorStore(0))
    cosines = []
    for index in data.indices[np.linspace(0, len(data.indices) - 1, 10).round().astype(int)].tolist():
        batch = collate(data.read_many([index]), checkpoint.sequence_format, vision.gather)
        with torch.no_grad():
            embedded = student.embed_inputs(batch.input_ids, batch.visual_positions, batch.vision)
            states = model.model.language_model(inputs_embeds=embedded, output_hidden_states=True).hidden_states
        cosines.append(torch.stack([torch.cosine_similarity(*states[i : i + 2], dim=-1)[0] for i in range(3)]))
    expected = (1 - torch.cat(cosines, dim=1)).mean(dim=1)
    torch.testing.assert_close(torch.tensor(measured[:3]), expected, rtol=1e-4, atol=1e-6)
    assert max(abs(each) for each in measured[1:3]) < 1e-6 < min(measured[0], measured[3])


def test_the_samples_are_described_by_content(deep: Path, cache: Path) -> None:
    described = make_change(deep, cache).describe()
    assert described["num_samples"] == 10
    assert described == make_change(deep, cache).describe()
    assert make_change(deep, cache, slice=999).describe()["num_samples"] == 24
    other = make_change(deep, cache)
    moved = LayerChange(other.stage.model_copy(update={"splits": ("test",)}), other.section, str(cache))
    assert moved.describe() != described


def test_a_change_that_is_no_number_is_refused(deep: Path, cache: Path, tmp_path: Path) -> None:
    model: Any = load_weights(deep)
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(StillhouseError, match=r"changes of its layers are .*nan.*, expected finite numbers"):
        make_change(deep, cache).measure(model, list(model.get_decoder().layers))


def test_a_model_that_does_not_fit_the_cache_is_refused(deep: Path, cache: Path, tmp_path: Path) -> None:
    make_tiny_llava(tmp_path / "other", num_layers=4)
    make_tiny_tokenizer((*SPECIAL_TOKENS, "<more>")).save_pretrained(tmp_path / "other")
    change = make_change(tmp_path / "other", cache)
    model = load_weights(tmp_path / "other")
    with pytest.raises(IdentityError, match="tokenizer_fingerprint"):
        change.measure(model, model.model.language_model.layers)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_pruned_student_trains_and_is_pruned_once(deep: Path, make_runner: Callable[..., Runner], ranks: int) -> None:
    """Its result is pruned once more by the next stage."""
    kd = {"response": {}, "visual": {}, "relation": {"weight": 0.5}}
    first = {"model": str(deep), "layers": 2, "choose": "least_change", "slice": 8}
    second = {"model": "{run}/heal-0", "layers": [1], "width": {"intermediate_size": 64, "hidden_size": 32}}
    runner = make_runner(
        heal={"init": "{run}/pruned", "prune": first, "losses": kd},
        narrow={"init": "{run}/narrow", "prune": second, "losses": kd},
    )
    outcomes = runner.run_in_turn(("heal",), ("heal",), ("narrow",), ranks=ranks)
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    run = runner.folder / "runs" / "t"
    whole, pruned = (load_file(folder / "model.safetensors") for folder in (deep, run / "pruned"))
    layer = "language_model.model.layers.{}.mlp.up_proj.weight".format
    assert torch.equal(pruned[layer(0)], whole["language_model.model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(pruned[layer(1)], whole["language_model.model.layers.3.mlp.up_proj.weight"])
    assert not torch.equal(load_file(run / "heal-0" / "model.safetensors")[layer(0)], pruned[layer(0)])
    record = json.loads((run / "pruned" / "composition.json").read_bytes())
    assert record["samples"]["num_samples"] == 8
    narrow = json.loads((run / "narrow-0" / "config.json").read_bytes())["text_config"]
    assert (narrow["num_hidden_layers"], narrow["hidden_size"], narrow["intermediate_size"]) == (1, 32, 64)


def test_what_a_stage_starts_from_is_the_same_before_and_after_its_student_is_pruned(deep: Path) -> None:
    """So that finished runs of an ablation are not repeated."""
    stage = StageSection.model_validate({"init": "none", "steps": 1, "prune": {"model": str(deep), "layers": 2}})
    assert stage.prune is not None
    before = collect_init_inputs(stage, stage.init)
    assert collect_init_inputs(stage, str(deep)) == before
    changed = stage.model_copy(update={"prune": stage.prune.model_copy(update={"layers": 3})})
    assert collect_init_inputs(changed, stage.init) != before
