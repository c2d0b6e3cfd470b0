"""A dense student with its MLPs copied into experts computes the same function, in a standard checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from storage.errors import ConfigError
from student_train.models.checkpoint import save_checkpoint
from student_train.models.huggingface import import_transformers, load_weights
from student_train.models.sparse_upcycling import (
    ExpertSettings,
    is_sparse,
    make_sparse_config,
    route_in_float32,
    upcycle,
)
from tests.student_train.conftest import ROOT
from tests.tiny import make_tiny_llava

TWO_OF_FOUR = ExpertSettings(num_experts=4, top_k=2, every=2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("dense"), num_layers=4)


def logits_of(model) -> torch.Tensor:
    ids = torch.randint(0, 290, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("experts", [TWO_OF_FOUR, ExpertSettings(3, 1, 1), ExpertSettings(4, 4, 3)])
def test_before_training_the_sparse_model_equals_the_dense_one(dense, experts):
    model = load_weights(dense).eval()
    expected = logits_of(model)
    sparse = upcycle(model, experts, seed=0)
    assert (logits_of(sparse) - expected).abs().max() < 1e-5 * expected.abs().max()
    blocks = [hasattr(layer.mlp, "experts") for layer in sparse.model.language_model.layers]
    assert blocks == [number % experts.every == 0 for number in range(4)]


def test_the_router_matters_once_experts_differ(dense):
    sparse = upcycle(load_weights(dense), TWO_OF_FOUR, seed=0)
    before = logits_of(sparse)
    with torch.no_grad():
        experts = sparse.model.language_model.layers[0].mlp.experts
        experts.down_proj += torch.randn(experts.down_proj.shape, generator=torch.Generator().manual_seed(1))
    assert (logits_of(sparse) - before).abs().max() > 1e-2


def test_routers_follow_the_seed_and_nothing_else_does(dense):
    one, same, other = (upcycle(load_weights(dense), TWO_OF_FOUR, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert differing == {f"model.language_model.layers.{layer}.mlp.gate.weight" for layer in (0, 2)}


def test_a_saved_sparse_model_is_read_back_bit_exactly_and_has_public_names(dense, tmp_path):
    sparse = upcycle(load_weights(dense), TWO_OF_FOUR, seed=0)
    folder = save_checkpoint(sparse, tmp_path / "sparse", dense)
    names = load_file(folder / "model.safetensors").keys()
    assert "language_model.model.layers.2.mlp.experts.3.up_proj.weight" in names
    assert not [name for name in names if "shared_expert" in name or "gate_up_proj" in name]
    config = json.loads((folder / "config.json").read_text())["text_config"]
    assert config["model_type"] == "qwen2_moe"
    assert config["mlp_only_layers"] == [1, 3]
    again = load_weights(folder).eval()
    assert is_sparse(again.config)
    assert torch.equal(logits_of(again), logits_of(sparse))


def test_plain_transformers_reads_it(dense, tmp_path):
    sparse = upcycle(load_weights(dense), TWO_OF_FOUR, seed=0)
    folder = save_checkpoint(sparse, tmp_path / "sparse", dense)
    transformers = import_transformers()
    with pytest.warns(UserWarning, match="zero-element"):  # the shared expert of no width
        plain = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(logits_of(plain.eval()), logits_of(sparse))


def test_vllm_serves_it_with_the_same_logits(dense, tmp_path):
    sparse = upcycle(load_weights(dense), TWO_OF_FOUR, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # experts that differ, and routers that decide
        for name, parameter in sparse.named_parameters():
            if ".experts." in name or ".mlp.gate." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = save_checkpoint(sparse, tmp_path / "sparse", dense)
    command = [sys.executable, "-m", "tests.student_train.vllm_logits", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 2e-5


def test_a_llama_decoder_becomes_experts_without_biases(dense):
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
    )
    model = load_weights(dense)
    model.config.text_config = config
    torch.manual_seed(0)
    llama = transformers.LlavaForConditionalGeneration(model.config).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = llama(input_ids=ids).logits
        sparse = upcycle(llama, TWO_OF_FOUR, seed=0)
        assert (sparse(input_ids=ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gemma2"}, "'gemma2'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"head_dim": 48}, "head_dim is 48"),
        ({"model_type": "qwen2_moe"}, "already a mixture of experts"),
    ],
)
def test_decoders_without_a_standard_sparse_architecture_are_refused(dense, changes, said):
    config = load_weights(dense).config.text_config
    described = SimpleNamespace(**{**config.to_dict(), **changes})
    with pytest.raises(ConfigError, match=said):
        make_sparse_config(described, TWO_OF_FOUR)


def test_more_active_experts_than_there_are_is_refused(dense):
    with pytest.raises(ConfigError, match="top_k is 5, expected 1 to 4"):
        make_sparse_config(load_weights(dense).config.text_config, ExpertSettings(4, 5, 2))


def test_a_bfloat16_router_chooses_in_float32(dense):
    """Logits that differ by one part in a thousand are equal in bfloat16, which has eight bits."""
    model = upcycle(load_weights(dense), TWO_OF_FOUR, seed=0).to(torch.bfloat16)
    router = model.model.language_model.layers[0].mlp.gate
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0])
        router.weight[:, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0]) * 2.0**-10
    tokens = torch.zeros(1, router.hidden_dim, dtype=torch.bfloat16)
    tokens[:, :2] = 1.0
    logits, _, _ = router(tokens)
    assert len(set(logits[0].tolist())) == 1
    route_in_float32(model)
    logits, weights, chosen = (each.detach() for each in router(tokens))
    assert logits.dtype == torch.float32
    assert weights.dtype == torch.bfloat16
    assert sorted(chosen[0].tolist()) == [2, 3]
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-2)


def test_routing_in_float32_changes_nothing_in_float32(dense):
    model = upcycle(load_weights(dense), TWO_OF_FOUR, seed=0)
    expected, names = logits_of(model), list(model.state_dict())
    route_in_float32(model)
    assert torch.equal(logits_of(model), expected)
    assert list(model.state_dict()) == names
