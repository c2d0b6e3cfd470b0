"""A converted model computes what the foreign one does, written anew in foreign_forward.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.conversion.conversion import Options
from stillhouse.conversion.convert import convert
from student_train.models.huggingface import load_processor, load_weights
from tests.stillhouse.conversion import foreign_checkpoints as foreign
from tests.stillhouse.conversion.foreign_forward import (
    IMAGE,
    DecoderShape,
    TowerShape,
    compute_tower_states,
    make_llama_layer,
    make_pixels,
    make_qwen1_layer,
    normalise_rms,
    project,
    run_decoder,
)

IDS = [5, 17, 40, IMAGE, 8, 120, 77, 33, 251, 60]
SHAPE = DecoderShape(foreign.NUM_LAYERS, foreign.NUM_HEADS, foreign.NUM_KV_HEADS, rope_theta=5000.0)


def compute_features(tensors: dict[str, Tensor], prefix: str, kind: str, pixels: Tensor, *, layer: int) -> Tensor:
    shape = TowerShape(kind, foreign.TOWER_HEADS, foreign.PATCH)
    return compute_tower_states(tensors, f"{prefix}vision_model.", shape, pixels)[layer]


def compute_converted(target: Path, num_tokens: int, *, size: tuple[int, int] = (41, 29)) -> tuple[Tensor, Tensor]:
    """Return the converted model's logits, and the pixels that its processor makes."""
    processor = load_processor(target)
    pixels = processor.image_processor(images=[foreign.make_picture(size)], return_tensors="pt")["pixel_values"]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    ids = [token for each in IDS for token in ([image] * num_tokens if each == IMAGE else [each])]
    model: Any = load_weights(target, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0], pixels


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape[1] >= expected.shape[1]
    torch.testing.assert_close(
        got[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize(
    ("decoder", "tower", "tied", "parts"),
    [("qwen2", "siglip", True, False), ("qwen2", "clip", False, True), ("llama", "siglip", False, False),
     ("qwen2", "siglip", True, True), ("gemma", "siglip", True, False)],
)  # fmt: skip
def test_tinyllava_has_the_logits_of_its_source(
    tmp_path: Path, decoder: str, tower: str, tied: bool, parts: bool
) -> None:
    rows = foreign.NUM_TOKENS if decoder == "llama" else 320
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    tensors = foreign.make_tinyllava(source, decoder=decoder, tower=tower, tied=tied, parts=parts, rows=rows)
    result = convert(source, target)
    assert result.is_new
    pixels = make_pixels(foreign.make_picture(), kind=tower, size=foreign.IMAGE_SIZE)
    features = compute_features(tensors, "vision_tower._vision_tower.", tower, pixels, layer=-2)[1:]  # even of SigLIP
    assert len(features) == (15 if tower == "siglip" else 16)
    features = project(tensors, "connector._connector.", features)
    is_gemma = decoder == "gemma"
    shape = DecoderShape(**{**vars(SHAPE), "gemma": is_gemma})
    states = run_decoder(
        IDS, features, tensors["language_model.model.embed_tokens.weight"],
        make_llama_layer(tensors, "language_model.model.", shape), foreign.NUM_LAYERS,
        scale=math.sqrt(foreign.HIDDEN) if is_gemma else 1.0,
    )  # fmt: skip
    norm = tensors["language_model.model.norm.weight"] + is_gemma
    logits = normalise_rms(states, norm, 1e-6) @ tensors["language_model.lm_head.weight"].T
    got, shown = compute_converted(target, len(features))
    torch.testing.assert_close(shown, pixels, atol=1e-5, rtol=1e-5)
    assert_same(got, logits)


@pytest.mark.parametrize(
    ("kind", "tower", "with_tower"),
    [
        ("llava_llama", "clip", True),
        ("llava_llama", "clip", False),
        ("llava_qwen", "siglip", True),
        ("llava_qwen", "siglip", False),
    ],
)
def test_llava_has_the_logits_of_its_source(tmp_path: Path, kind: str, tower: str, with_tower: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    tensors = foreign.make_llava(source, kind=kind, tower=tower, with_tower=with_tower)
    convert(source, target)
    assert_llava(target, tensors, tower)


def assert_llava(target: Path, tensors: dict[str, Tensor], tower: str) -> None:
    """Compare with LLaVA: CLIP without its class token, or all positions of SigLIP without its last layer."""
    pixels = make_pixels(foreign.make_picture(), kind=tower, size=foreign.IMAGE_SIZE, pad=True)
    features = compute_features(tensors, "model.vision_tower.vision_tower.", tower, pixels, layer=-2)
    features = project(tensors, "model.mm_projector.", features[1:] if tower == "clip" else features)
    assert len(features) == 16
    layer = make_llama_layer(tensors, "model.", SHAPE)
    states = run_decoder(IDS, features, tensors["model.embed_tokens.weight"], layer, foreign.NUM_LAYERS)
    got, shown = compute_converted(target, len(features))
    torch.testing.assert_close(shown, pixels, atol=1e-5, rtol=1e-5)
    assert_same(got, normalise_rms(states, tensors["model.norm.weight"], 1e-6) @ tensors["lm_head.weight"].T)


def test_a_lone_projector_is_put_onto_its_base(tmp_path: Path) -> None:
    whole, base, source = tmp_path / "whole", tmp_path / "base", tmp_path / "source"
    tensors = foreign.make_llava(whole)
    decoder = {name: value for name, value in tensors.items() if ".vision_tower." not in name}
    projector = {name: value for name, value in decoder.items() if "mm_projector" in name}
    base.mkdir()
    foreign.save_tokenizer(base, foreign.LLAMA_TOKENS, eos="</s>")
    torch.save({n: v for n, v in decoder.items() if n not in projector}, base / "pytorch_model.bin")
    source.mkdir()
    (source / "config.json").write_bytes((whole / "config.json").read_bytes())
    torch.save(projector, source / "mm_projector.bin")
    with pytest.raises(Exception, match=r"a projector alone.*--base DIR"):
        convert(source, tmp_path / "target")
    convert(source, tmp_path / "target", Options(base=base))
    assert_llava(tmp_path / "target", tensors, "clip")


@pytest.mark.parametrize(("kind", "top_k"), [("moe_llava_qwen2", 2), ("moe_llava_qwen1_5", 1), ("moe_llava_qwen", 2)])
def test_a_mixture_has_the_logits_of_its_source_without_chance(tmp_path: Path, kind: str, top_k: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    tensors = foreign.make_moe_llava(source, kind=kind, top_k=top_k)
    notes = "\n".join(convert(source, target).notes)
    assert ("second expert at random" in notes) == (top_k == 2)
    assert "in training the source drops tokens" in notes
    base = "transformer." if kind == "moe_llava_qwen" else "model."
    pixels = make_pixels(foreign.make_picture(), kind="clip", size=foreign.IMAGE_SIZE, pad=True)
    features = compute_features(tensors, f"{base}image_tower.image_tower.", "clip", pixels, layer=-2)[1:]
    features = project(tensors, f"{base}mm_projector.image_spatial_proj.", features)
    if kind == "moe_llava_qwen":
        shape = DecoderShape(**{**vars(SHAPE), "num_kv_heads": foreign.NUM_HEADS, "top_k": top_k})
        layer, embed, norm = make_qwen1_layer(tensors, base, shape), "wte", "ln_f"
    else:
        shape = DecoderShape(**{**vars(SHAPE), "top_k": top_k})
        layer, embed, norm = make_llama_layer(tensors, base, shape), "embed_tokens", "norm"
    states = run_decoder(IDS, features, tensors[f"{base}{embed}.weight"], layer, foreign.NUM_LAYERS)
    got, shown = compute_converted(target, len(features))
    torch.testing.assert_close(shown, pixels, atol=1e-5, rtol=1e-5)
    assert_same(got, normalise_rms(states, tensors[f"{base}{norm}.weight"], 1e-6) @ tensors["lm_head.weight"].T)
