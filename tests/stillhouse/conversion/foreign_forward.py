"""The forward passes of foreign models, in plain tensor arithmetic over tensors with their own names.

Written from the formats' facts, without transformers, so that a converted checkpoint has something to agree with.

Legend: t tokens, d hidden, n positions of the tower, s features of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

IMAGE = -200  # the placeholder of an image among token ids
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class TowerShape:
    """A tower's numbers that its tensors do not show."""

    kind: str  # clip or siglip
    num_heads: int
    patch_size: int


@dataclass(frozen=True)
class DecoderShape:
    """A decoder's numbers that its tensors do not show."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    eps: float = 1e-6
    rope_theta: float = 10000.0
    gemma: bool = False
    top_k: int = 0


def make_pixels(picture: Image.Image, *, kind: str, size: int, pad: bool = False) -> Tensor:
    """Return (1, 3, size, size) as the towers' own image processors make them of a picture, padded first or not."""
    mean, std = ([0.5] * 3, [0.5] * 3)
    if kind == "clip":
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    if pad and picture.width != picture.height:
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    if kind == "siglip":
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    else:  # the shorter side, then the middle
        scale = size / min(picture.size)
        wide = (int(picture.width * scale), int(picture.height * scale))
        picture = picture.resize(wide, Image.Resampling.BICUBIC)
        left, top = (wide[0] - size) // 2, (wide[1] - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    values = torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.float32).view(size, size, 3) / 255
    return ((values - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None]


def compute_tower_states(weights: Weights, prefix: str, shape: TowerShape, pixels: Tensor) -> list[Tensor]:
    """Return the hidden states (n, d) before the first layer and after each, of the names `prefix` + vision_model."""

    def get(name: str) -> Tensor:
        return weights[f"{prefix}{name}"]

    bias = get("embeddings.patch_embedding.bias") if shape.kind == "siglip" else None
    patches = F.conv2d(pixels, get("embeddings.patch_embedding.weight"), bias, stride=shape.patch_size)
    x = patches.flatten(2)[0].T
    if shape.kind == "clip":
        x = torch.cat([get("embeddings.class_embedding")[None], x])
    x = x + get("embeddings.position_embedding.weight")
    norm_eps = 1e-5 if shape.kind == "clip" else 1e-6

    def normalise(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), norm_eps)

    def apply(x: Tensor, name: str) -> Tensor:
        return F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))

    if shape.kind == "clip":
        x = normalise(x, "pre_layrnorm")
    states, layer = [x], 0
    while f"{prefix}encoder.layers.{layer}.layer_norm1.weight" in weights:
        name = f"encoder.layers.{layer}"
        y = normalise(x, f"{name}.layer_norm1")
        parts = [apply(y, f"{name}.self_attn.{part}_proj") for part in "qkv"]
        q, k, v = (part.view(len(x), shape.num_heads, -1).transpose(0, 1) for part in parts)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + apply((scores @ v).transpose(0, 1).flatten(1), f"{name}.self_attn.out_proj")
        y = apply(normalise(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")
        y = y * torch.sigmoid(1.702 * y) if shape.kind == "clip" else F.gelu(y, approximate="tanh")
        x = x + apply(y, f"{name}.mlp.fc2")
        states.append(x)
        layer += 1
    return states


def project(weights: Weights, prefix: str, features: Tensor) -> Tensor:
    """Return the features after a two-layer MLP with exact GELU, whose layers are 0 and 2 of a Sequential."""
    hidden = F.gelu(F.linear(features, weights[f"{prefix}0.weight"], weights[f"{prefix}0.bias"]))
    return F.linear(hidden, weights[f"{prefix}2.weight"], weights[f"{prefix}2.bias"])


def run_decoder(
    ids: Sequence[int],
    features: Tensor,
    embed: Tensor,
    layer: Callable[[Tensor, int], Tensor],
    num_layers: int,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Return the last states (t, d): embeddings, with an image's features for IMAGE, through all layers."""
    pieces = [features if token == IMAGE else embed[token][None] for token in ids]
    x = torch.cat(pieces) * scale
    for number in range(num_layers):
        x = layer(x, number)
    return x


def normalise_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return root-mean-square normalised rows."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def attend(q: Tensor, k: Tensor, v: Tensor, shape: DecoderShape) -> Tensor:
    """Return causal attention of (t, heads * width) with rotated positions, with fewer heads of keys and values."""
    length, width = len(q), q.shape[1] // shape.num_heads
    angles = torch.outer(
        torch.arange(length, dtype=torch.float32),
        shape.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width),
    )
    cos, sin = angles.cos().repeat(1, 2)[None], angles.sin().repeat(1, 2)[None]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def split(x: Tensor, heads: int) -> Tensor:
        return x.view(length, heads, width).transpose(0, 1)

    shared = shape.num_heads // shape.num_kv_heads
    queries = rotate(split(q, shape.num_heads))
    keys = rotate(split(k, shape.num_kv_heads)).repeat_interleave(shared, dim=0)
    values = split(v, shape.num_kv_heads).repeat_interleave(shared, dim=0)
    scores = queries @ keys.mT / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    return (scores @ values).transpose(0, 1).flatten(1)


def make_llama_layer(weights: Weights, prefix: str, shape: DecoderShape) -> Callable[[Tensor, int], Tensor]:
    """Return the layer of Llama, Qwen2 (with biases) or Gemma, with DeepSpeed's experts where a layer has them."""

    def apply(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def normalise(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"]
        return normalise_rms(x, weight + 1 if shape.gemma else weight, shape.eps)

    def run_mlp(x: Tensor, name: str) -> Tensor:
        gate = apply(x, f"{name}.gate_proj")
        gate = F.gelu(gate, approximate="tanh") if shape.gemma else F.silu(gate)
        return apply(gate * apply(x, f"{name}.up_proj"), f"{name}.down_proj")

    def layer(x: Tensor, number: int) -> Tensor:
        name = f"{prefix}layers.{number}"
        y = normalise(x, f"{name}.input_layernorm")
        q, k, v = (apply(y, f"{name}.self_attn.{part}_proj") for part in "qkv")
        x = x + apply(attend(q, k, v, shape), f"{name}.self_attn.o_proj")
        y = normalise(x, f"{name}.post_attention_layernorm")
        if f"{name}.mlp.deepspeed_moe.gate.wg.weight" in weights:
            return x + mix_experts(weights, f"{name}.mlp", y, run_mlp, shape.top_k)
        return x + run_mlp(y, f"{name}.mlp")

    return layer


def make_qwen1_layer(weights: Weights, prefix: str, shape: DecoderShape) -> Callable[[Tensor, int], Tensor]:
    """Return the layer of the first Qwen: joined q, k and v; silu is of w2."""

    def run_mlp(x: Tensor, name: str) -> Tensor:
        first, second = F.linear(x, weights[f"{name}.w1.weight"]), F.linear(x, weights[f"{name}.w2.weight"])
        return F.linear(first * F.silu(second), weights[f"{name}.c_proj.weight"])

    def layer(x: Tensor, number: int) -> Tensor:
        name = f"{prefix}h.{number}"
        y = normalise_rms(x, weights[f"{name}.ln_1.weight"], shape.eps)
        joined = F.linear(y, weights[f"{name}.attn.c_attn.weight"], weights[f"{name}.attn.c_attn.bias"])
        q, k, v = joined.split(x.shape[1], dim=1)
        x = x + F.linear(attend(q, k, v, shape), weights[f"{name}.attn.c_proj.weight"])
        y = normalise_rms(x, weights[f"{name}.ln_2.weight"], shape.eps)
        if f"{name}.mlp.deepspeed_moe.gate.wg.weight" in weights:
            return x + mix_experts(weights, f"{name}.mlp", y, run_mlp, shape.top_k)
        return x + run_mlp(y, f"{name}.mlp")

    return layer


def mix_experts(weights: Weights, name: str, x: Tensor, run_mlp: Callable[[Tensor, str], Tensor], top_k: int) -> Tensor:
    """Return DeepSpeed's mixture without noise and without a limit of capacity.

    The gate is in float32. Of two experts the softmax values are renormalised; of one the value is taken as it is.
    """
    gates = F.linear(x.float(), weights[f"{name}.deepspeed_moe.gate.wg.weight"].float()).softmax(-1)
    rows: list[Tensor] = []
    for row, gate in zip(x, gates, strict=True):
        order: Any = gate.argsort(descending=True)[:top_k].tolist()
        total = sum(gate[expert] for expert in order) if top_k == 2 else torch.tensor(1.0)
        experts = f"{name}.deepspeed_moe.experts.deepspeed_experts"
        outputs = [gate[expert] / total * run_mlp(row[None], f"{experts}.{expert}") for expert in order]
        rows.append(torch.stack(outputs).sum(0))
    return torch.cat(rows)
