from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from storage.errors import StillhouseError
from student_train.models.checkpoint import recover_checkpoint, save_checkpoint, to_legacy_name
from student_train.models.huggingface import import_transformers, load_processor
from student_train.models.loading import load_student, read_checkpoint
from student_train.template_arguments import read_template_arguments
from tests.tiny import make_tiny_llava

CPU = torch.device("cpu")


@pytest.fixture
def model(checkpoint: Path) -> Any:
    model = load_student(read_checkpoint(checkpoint), precision="fp32", device=CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def names(folder: Path) -> set[str]:
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            found |= set(tensors.keys())
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    image_token = model.config.image_token_id
    ids = torch.tensor([[5, *[image_token] * 16, 7, 8, 9]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, pixel_values=pixels).logits


def test_a_saved_model_gives_the_same_logits(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "out", checkpoint)
    loaded, info = import_transformers().AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]


def test_a_checkpoint_names_the_template_arguments_that_it_was_trained_with(
    model: Any, checkpoint: Path, tmp_path: Path
) -> None:
    thinking = {"enable_thinking": True}
    first = save_checkpoint(model, tmp_path / "first", checkpoint, template_arguments=thinking)
    assert read_template_arguments(first) == read_checkpoint(first).template_arguments == thinking
    copied = save_checkpoint(model, tmp_path / "copied", first)
    assert read_template_arguments(copied) == thinking
    save_checkpoint(model, copied, copied, template_arguments={})  # then trained on a cache that was given none
    assert read_template_arguments(copied) == {}
    assert not (copied / "chat_template_arguments.json").exists()


def test_tensors_have_the_names_that_vllm_reads(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "out", checkpoint)
    assert {name.split(".")[0] for name in names(folder)} == {
        "language_model", "multi_modal_projector", "vision_tower"
    }  # fmt: skip
    assert "language_model.lm_head.weight" in names(folder)
    assert "language_model.model.embed_tokens.weight" in names(folder)
    assert all(
        name.startswith("vision_tower.vision_model.") for name in names(folder) if name.startswith("vision_tower")
    )
    assert to_legacy_name("model.vision_tower.vision_model.x") == "vision_tower.vision_model.x"


def test_a_tied_head_is_stored_once(checkpoint: Path, tmp_path: Path) -> None:
    source = make_tiny_llava(tmp_path / "tied", tied=True, num_layers=1)
    model = load_student(read_checkpoint(source), precision="fp32", device=CPU)
    folder = save_checkpoint(model, tmp_path / "out", source)
    assert "language_model.lm_head.weight" not in names(folder)
    loaded = load_student(read_checkpoint(folder), precision="fp32", device=CPU)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()


def test_a_large_model_is_sharded(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "out", checkpoint, max_shard_bytes=100_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    loaded = load_student(read_checkpoint(folder), precision="fp32", device=CPU)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    save_checkpoint(model, folder, checkpoint)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]


def test_tokenizer_and_template_are_copied_byte_exactly(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "out", checkpoint)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"):
        assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()
    assert load_processor(folder).chat_template


def test_other_files_of_the_folder_are_kept(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as log:
        log.write("1\n")
        log.flush()
        save_checkpoint(model, folder, checkpoint)
        log.write("2\n")  # a log that is open goes on in the new folder
    assert (folder / "metrics.jsonl").read_text() == "1\n2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_save_that_fails_leaves_the_old_checkpoint(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "out", checkpoint)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(StillhouseError, match="has no tokenizer"):
        save_checkpoint(model, folder, bare)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shutil.rmtree(bare)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_may_be_saved_over_its_own_source(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(checkpoint, folder)
    save_checkpoint(model, folder, folder)
    loaded = load_student(read_checkpoint(folder), precision="fp32", device=CPU)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_what_a_kill_between_two_renames_left_is_put_back(tmp_path: Path) -> None:
    """The old folder and its content are restored, an incomplete one is deleted, others are not touched."""
    folder = tmp_path / "kd [1]"
    for name in ("kd [1].tmp-7-ab-old", "kd [1].tmp-7-ab", "kd 1.tmp-7-ab", "kd [1]x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    recover_checkpoint(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kd 1.tmp-7-ab", "kd [1]", "kd [1]x"]
    assert (folder / "config.json").read_text() == "kd [1].tmp-7-ab-old"
    (tmp_path / "kd [1].tmp-8-cd-old").mkdir()  # it was killed after both renames
    recover_checkpoint(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kd 1.tmp-7-ab", "kd [1]", "kd [1]x"]
    assert (folder / "config.json").read_text() == "kd [1].tmp-7-ab-old"
    recover_checkpoint(tmp_path / "none/there")
