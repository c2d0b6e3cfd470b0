"""A decoder in a GGUF file becomes one of transformers with the same logits; the file is written by gguf itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.conversion.conversion import Options
from stillhouse.conversion.convert import convert
from storage.errors import ConfigError
from student_train.models.huggingface import load_weights
from student_train.models.loading import read_checkpoint
from tests.stillhouse.conversion import foreign_checkpoints as foreign
from tests.stillhouse.conversion.foreign_forward import DecoderShape, make_llama_layer, normalise_rms, run_decoder
from tests.tiny import make_tiny_tokenizer

IDS = [5, 17, 40, 8, 120, 77, 33, 251, 60]
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def name_in_gguf(name: str) -> str:
    if name in ("embed_tokens.weight", "norm.weight"):
        return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
    _, layer, rest = name.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def write_gguf(path: Path) -> dict[str, Tensor]:
    """Write a tiny Qwen2 with tied embeddings, its MLPs in Q8_0; return the values that the file holds."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    tensors = foreign.draw(foreign.list_decoder("", rows=foreign.NUM_TOKENS))
    writer: Any = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(512)
    writer.add_embedding_length(foreign.HIDDEN)
    writer.add_block_count(foreign.NUM_LAYERS)
    writer.add_feed_forward_length(foreign.WIDTH)
    writer.add_head_count(foreign.NUM_HEADS)
    writer.add_head_count_kv(foreign.NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(foreign.NUM_TOKENS)
    add_tokenizer(writer)
    for name, tensor in list(tensors.items()):
        values = tensor.numpy()
        if ".mlp." in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(name_in_gguf(name), packed, raw_dtype=kind)
            tensors[name] = torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind), np.float32))
        else:
            writer.add_tensor(name_in_gguf(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def add_tokenizer(writer: Any) -> None:
    tokenizer = make_tiny_tokenizer(foreign.QWEN_TOKENS, image_token=None)
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(list(range(foreign.NUM_TOKENS)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in foreign.QWEN_TOKENS else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))


def test_a_gguf_decoder_has_the_logits_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    tensors = write_gguf(tmp_path / "source" / "tiny.gguf")
    result = convert(tmp_path / "source", tmp_path / "target")  # the only such file of its folder
    assert result.format == "gguf"
    assert any("float32" in note for note in result.notes)
    shape = DecoderShape(foreign.NUM_LAYERS, foreign.NUM_HEADS, foreign.NUM_KV_HEADS, rope_theta=5000.0)
    states = run_decoder(
        IDS, torch.empty(0), tensors["embed_tokens.weight"], make_llama_layer(tensors, "", shape), foreign.NUM_LAYERS
    )
    expected = normalise_rms(states, tensors["norm.weight"], 1e-6) @ tensors["embed_tokens.weight"].T
    model: Any = load_weights(tmp_path / "target", dtype=torch.float32).eval()
    with torch.no_grad():
        got = model(input_ids=torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    checkpoint = read_checkpoint(tmp_path / "target")
    assert checkpoint.tokenizer.convert_tokens_to_ids("<|im_end|>") == 299
    assert not convert(tmp_path / "source" / "tiny.gguf", tmp_path / "target").is_new
    with pytest.raises(ConfigError, match=r"options differ"):
        convert(tmp_path / "source" / "tiny.gguf", tmp_path / "target", Options(dtype="bfloat16"))


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    broken, cut = tmp_path / "broken.gguf", tmp_path / "cut.gguf"
    broken.write_bytes(b"not a GGUF file")
    with pytest.raises(ConfigError, match=r"broken\.gguf: begins with b'not '"):
        convert(broken, tmp_path / "target")
    write_gguf(cut)
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(ConfigError, match=r"cut\.gguf: transformers cannot read this GGUF file"):
        convert(cut, tmp_path / "target")
    with pytest.raises(ConfigError, match=r"several \.gguf files"):
        convert(tmp_path, tmp_path / "target")
    assert not (tmp_path / "target").exists()
