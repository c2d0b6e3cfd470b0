from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from storage.errors import ConfigError, StillhouseError
from teacher_dump.teachers import hf_checkpoint as checkpoint

TENSORS = {
    "vision_tower.encoder.weight": torch.arange(6.0).reshape(2, 3),
    "language_model.lm_head.weight": torch.ones(2, 2, dtype=torch.bfloat16),
}
SIGLIP = {"vision_config": {"model_type": "siglip_vision_model"}}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_the_view_holds_the_same_tensors_under_the_names_that_vllm_knows(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", TENSORS, SIGLIP)
    view = checkpoint.make_servable_view(folder, into=tmp_path / "served")
    assert view.parent == tmp_path / "served"
    got = load_file(view / "model.safetensors")
    assert set(got) == {"vision_tower.vision_model.encoder.weight", "language_model.lm_head.weight"}
    assert torch.equal(got["vision_tower.vision_model.encoder.weight"], TENSORS["vision_tower.encoder.weight"])
    assert got["language_model.lm_head.weight"].dtype == torch.bfloat16
    with safe_open(view / "model.safetensors", "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
    assert (view / "config.json").is_symlink()
    assert checkpoint.make_servable_view(folder, into=tmp_path / "served") == view
    assert [path.name for path in (tmp_path / "served").iterdir()] == [view.name]


def test_a_sharded_checkpoint_is_rewritten_only_where_it_must(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {}, SIGLIP)
    (folder / "model.safetensors").unlink()
    names = list(TENSORS)
    for number, name in enumerate(names):
        save_file({name: TENSORS[name]}, folder / f"model-{number}.safetensors")
    index = {
        "metadata": {},
        "weight_map": {name: f"model-{number}.safetensors" for number, name in enumerate(names)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    view = checkpoint.make_servable_view(folder, into=tmp_path / "served")
    assert not (view / "model-0.safetensors").is_symlink()
    assert (view / "model-1.safetensors").is_symlink()
    assert set(checkpoint.map_tensor_files(view)) == {
        "vision_tower.vision_model.encoder.weight", "language_model.lm_head.weight"
    }  # fmt: skip
    assert set(checkpoint.read_json(view / "model.safetensors.index.json")["weight_map"]) == set(
        checkpoint.map_tensor_files(view)
    )


def test_checkpoints_that_vllm_reads_are_served_as_they_are(tmp_path: Path) -> None:
    nested = {"model.vision_tower.vision_model.encoder.weight": torch.ones(1)}
    for name, tensors, config in (
        ("nested", nested, SIGLIP),
        ("pixtral", TENSORS, {"vision_config": {"model_type": "pixtral"}}),
        ("text", TENSORS, {}),
    ):
        folder = write(tmp_path / name, tensors, config)
        assert checkpoint.make_servable_view(folder, into=tmp_path / "served") == folder
    assert not (tmp_path / "served").exists()


def test_a_changed_checkpoint_gets_another_view(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", TENSORS, SIGLIP)
    first = checkpoint.make_servable_view(folder, into=tmp_path / "served")
    write(folder, {**TENSORS, "more": torch.ones(3)}, SIGLIP)
    assert checkpoint.make_servable_view(folder, into=tmp_path / "served") != first


def test_broken_weights_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", TENSORS, SIGLIP)
    for content in (b"", b"\xff" * 16, struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"[]"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(StillhouseError, match=r"model\.safetensors: is not a safetensors file"):
            checkpoint.map_tensor_files(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(StillhouseError, match="no safetensors weights"):
        checkpoint.list_weight_files(folder)
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(StillhouseError, match="outside"):
        checkpoint.list_weight_files(folder)


def test_dtype_is_what_the_config_says_or_what_most_weights_are(tmp_path: Path) -> None:
    assert checkpoint.read_saved_dtype(write(tmp_path / "said", TENSORS, {"dtype": "float16"})) == "float16"
    assert checkpoint.read_saved_dtype(write(tmp_path / "silent", TENSORS, {})) == "float32"
    inner = {"text_config": {"torch_dtype": "bfloat16"}}
    assert checkpoint.read_saved_dtype(write(tmp_path / "inner", TENSORS, inner)) == "bfloat16"


def test_a_folder_that_is_not_there_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.model"):
        checkpoint.resolve_checkpoint(str(tmp_path / "gone"), None, with_weights=True)
    with pytest.raises(ConfigError, match="no checkpoint is in the folder"):
        checkpoint.resolve_checkpoint(str(tmp_path), None, with_weights=True)
    assert checkpoint.resolve_checkpoint(str(tmp_path), None, with_weights=False) == tmp_path
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint.resolve_checkpoint(str(tmp_path), None, with_weights=True) == tmp_path
