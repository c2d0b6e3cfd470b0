from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from storage.errors import ConfigError, IdentityError, StillhouseError
from storage.identity import Identity
from storage.images.settings import PixelSettings, read_processor_settings, write_pixel_settings
from storage.reader.cache import Cache
from student_train.config import Precision
from student_train.models.loading import (
    check_fit,
    choose_attention,
    freeze,
    load_student,
    read_checkpoint,
)


@pytest.fixture(scope="module")
def identity(cache: Path) -> Identity:
    return Cache.open(cache, ()).identity


def edited(checkpoint: Path, folder: Path, file: str, *changes: tuple[str, object]) -> Path:
    """Copy a checkpoint and change dotted fields of one of its JSON files."""
    shutil.copytree(checkpoint, folder)
    document = json.loads((folder / file).read_text())
    for dotted, value in changes:
        *path, last = dotted.split(".")
        node = document
        for key in path:
            node = node[key]
        node[last] = value
    (folder / file).write_text(json.dumps(document))
    return folder


def test_a_student_of_the_same_family_fits(checkpoint: Path, identity: Identity) -> None:
    found = read_checkpoint(checkpoint)
    assert found.sequence_format.tokens_per_image == 16
    assert found.sequence_format.image_token_id == identity.image_token_id
    check_fit(found, identity)  # its head of 320 rows is padded beyond the tokenizer's 300


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokenizer_fingerprint", "0" * 64), ("vocab_size", 299), ("image_token_id", 7)],
)
def test_a_field_that_differs_is_named_with_both_values(
    checkpoint: Path, identity: Identity, field: str, value: object
) -> None:
    other = identity.model_copy(update={field: value})
    with pytest.raises(IdentityError) as caught:
        check_fit(read_checkpoint(checkpoint), other)
    message = str(caught.value)
    assert f"{field}: the cache has {value}" in message
    assert str(getattr(identity, field)) in message
    assert "teacher's tokenizer" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 0, "backend": None}, "pixels.version: the cache has 1, .* has 0"),
        ({"background": "#000000"}, "pixels.background: the cache has #ffffff, .* has #000000"),
        ({"backend": "torchvision"}, "pixels.backend: the cache has pil, .* has torchvision"),
    ],
)
def test_a_student_of_other_pixels_is_refused_by_field(
    checkpoint: Path, identity: Identity, tmp_path: Path, change: dict, said: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "student")
    write_pixel_settings(PixelSettings(**change), folder)
    with pytest.raises(IdentityError, match=said):
        check_fit(read_checkpoint(folder), identity)


def test_a_cache_resized_by_another_library_is_refused(checkpoint: Path, identity: Identity) -> None:
    other = identity.model_copy(update={"pixels": PixelSettings(backend="torchvision")})
    with pytest.raises(IdentityError, match=r"pixels.backend: the cache has torchvision, .* has pil"):
        check_fit(read_checkpoint(checkpoint), other)


def test_an_older_cache_takes_a_student_that_was_not_trained_on_newer_pixels(
    checkpoint: Path, identity: Identity, tmp_path: Path
) -> None:
    old = identity.model_copy(update={"pixels": None})
    assert check_fit(read_checkpoint(checkpoint), old) == ()
    folder = shutil.copytree(checkpoint, tmp_path / "student")
    write_pixel_settings(PixelSettings(), folder)
    with pytest.raises(IdentityError, match=r"pixels.version: the cache has 0, .* has 1"):
        check_fit(read_checkpoint(folder), old)


def test_another_size_or_mean_is_reported_and_not_refused(checkpoint: Path, identity: Identity) -> None:
    found = read_checkpoint(checkpoint)
    own = read_processor_settings(found.image_processor)
    assert own["size"] == {"height": 32, "width": 32}
    same = identity.model_copy(update={"image_processor": own})
    assert check_fit(found, same) == ()
    theirs = {**own, "size": {"height": 336, "width": 336}, "image_mean": [0.1, 0.2, 0.3]}
    notes = check_fit(found, identity.model_copy(update={"image_processor": theirs}))
    assert [note.split(":")[0] for note in notes] == ["image_processor.size", "image_processor.image_mean"]
    assert "336" in notes[0]
    assert "32" in notes[0]


def test_a_head_smaller_than_the_vocabulary_is_refused_without_reading_weights(
    checkpoint: Path, identity: Identity, tmp_path: Path
) -> None:
    folder = edited(checkpoint, tmp_path / "small", "config.json", ("text_config.vocab_size", 280))
    (folder / "model.safetensors").unlink()
    with pytest.raises(IdentityError, match=r"vocab_size: the cache has 300, the head of .*small 280 rows"):
        check_fit(read_checkpoint(folder), identity)


def test_another_architecture_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = edited(checkpoint, tmp_path / "other", "config.json", ("model_type", "siglip"))
    with pytest.raises(ConfigError, match="model_type is 'siglip', expected a vision-language"):
        read_checkpoint(folder)


def test_a_processor_of_another_resolution_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = edited(
        checkpoint, tmp_path / "other", "processor_config.json",
        ("image_processor.size", {"height": 64, "width": 64}),
    )  # fmt: skip
    with pytest.raises(StillhouseError, match="makes 64 x 64 pixels, but the vision tower expects 32 x 32"):
        read_checkpoint(folder)


def test_incomplete_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "incomplete"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "multi_modal_projector" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(StillhouseError, match="lack 1 tensors"):
        load_student(read_checkpoint(folder), precision="fp32", device=torch.device("cpu"))


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match="is not a checkpoint"):
        read_checkpoint(tmp_path)


def test_only_trained_parts_get_gradients_and_train_mode(checkpoint: Path) -> None:
    model = load_student(read_checkpoint(checkpoint), precision="fp32", device=torch.device("cpu"))
    freeze(model, ("projector",))
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"multi_modal_projector"}
    freeze(model, ("projector", "llm"))
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_tower"}
    assert model.lm_head.weight.requires_grad
    assert model.model.language_model.training
    assert not model.model.vision_tower.training


def test_the_decoder_s_layers_train_without_embeddings_and_head(checkpoint: Path) -> None:
    model = load_student(read_checkpoint(checkpoint), precision="fp32", device=torch.device("cpu"))
    freeze(model, ("layers",))
    layers = model.model.language_model.layers
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in layers.parameters()}
    assert all(module.training for layer in layers for module in layer.modules())
    assert not model.model.language_model.embed_tokens.training


@pytest.mark.parametrize(
    ("precision", "capability", "installed", "expected"),
    [
        ("bf16", (9, 0), {"flash_attn", "flash_attn_interface"}, "flash_attention_3"),
        ("fp16", (9, 0), {"flash_attn"}, "flash_attention_2"),
        ("bf16", (8, 0), {"flash_attn", "flash_attn_interface"}, "flash_attention_2"),
        ("bf16", (10, 0), {"flash_attn_interface"}, "sdpa"),
        ("bf16", (7, 5), {"flash_attn"}, "sdpa"),
        ("bf16", (9, 0), set(), "sdpa"),
        ("fp32", (9, 0), {"flash_attn", "flash_attn_interface"}, "sdpa"),
        ("fp32", None, set(), "sdpa"),
        ("bf16", None, {"flash_attn", "flash_attn_interface"}, "eager"),
    ],
)
def test_attention_is_chosen_by_gpu_precision_and_packages(
    precision: Precision, capability: tuple[int, int] | None, installed: set[str], expected: str
) -> None:
    assert choose_attention(precision, capability, installed) == expected
