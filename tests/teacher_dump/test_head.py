from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from storage.errors import StillhouseError
from storage.rows import SparseRows
from teacher_dump.head import OutputHead, read_head
from teacher_dump.selection import Threshold, TopK, row_uniforms


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 1000])
@pytest.mark.parametrize("selection", [TopK(4), Threshold(0.05)])
def test_chunks_change_nothing(rows_per_chunk: int, selection: TopK | Threshold) -> None:
    head, hidden, labels = OutputHead(random(50, 8)), random(20, 8, seed=1), torch.arange(20)
    uniforms = row_uniforms(20, seed=0, family="response", key="x")

    def rows_of(num_rows: int, rows_per_chunk: int) -> SparseRows:
        return head.sparse_rows(
            hidden[:num_rows],
            labels=labels[:num_rows],
            selection=selection,
            uniforms=uniforms[:num_rows],
            rows_per_chunk=rows_per_chunk,
        )

    whole, cut = rows_of(20, 20), rows_of(20, rows_per_chunk)
    assert cut.ids.tolist() == whole.ids.tolist()
    np.testing.assert_allclose(cut.logprobs, whole.logprobs, atol=1e-5)
    assert rows_of(0, rows_per_chunk).num_rows == 0


def logits_in_float64(head: OutputHead, hidden: torch.Tensor) -> np.ndarray:
    """The slow reference."""
    bias = 0 if head.bias is None else head.bias.double().numpy()
    logits = (hidden.double().numpy() @ head.weight.double().numpy().T + bias) * head.scale
    return logits if head.soft_cap is None else np.tanh(logits / head.soft_cap) * head.soft_cap


HEADS = [
    OutputHead(random(300, 16)),
    OutputHead(random(300, 16), scale=0.25),
    OutputHead(random(300, 16), bias=random(300, seed=2)),
    OutputHead(random(300, 16), soft_cap=3.0, scale=0.5),
]


@pytest.mark.parametrize("head", HEADS)
def test_logits_equal_the_float64_reference(head: OutputHead) -> None:
    hidden = random(12, 16, seed=1)
    np.testing.assert_allclose(head.logits(hidden).numpy(), logits_in_float64(head, hidden), atol=2e-5)
    half = hidden.to(torch.bfloat16)
    np.testing.assert_allclose(head.logits(half).numpy(), logits_in_float64(head, half), atol=2e-5)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_relation_is_the_normalised_gram_of_raw_logits(head: OutputHead, centered: bool) -> None:
    hidden = random(12, 16, seed=1)
    logits = logits_in_float64(head, hidden)
    logits = logits - logits.mean(axis=0) if centered else logits
    gram = logits @ logits.T
    relation = head.relation(hidden, centered=centered)
    assert relation.norm == pytest.approx(np.linalg.norm(gram), rel=1e-5)
    np.testing.assert_allclose(relation.values, gram / np.linalg.norm(gram), atol=1e-6)
    assert (relation.values == relation.values.T).all()
    assert relation.values.dtype == np.float32


def test_relation_of_a_single_centred_row_is_zero() -> None:
    relation = OutputHead(random(30, 4)).relation(random(1, 4), centered=True)
    assert relation.norm == 0
    assert relation.values.tolist() == [[0.0]]


def test_rows_beyond_the_real_vocabulary_are_cut_before_normalising(tmp_path: Path) -> None:
    weight, hidden = random(320, 8), random(5, 8, seed=1)
    weight[300:] *= 100  # would take all the mass
    head = read_head(write_checkpoint(tmp_path, {"lm_head.weight": weight}, model_type="x"), vocab_size=300)
    assert head.vocab_size == 300
    uniforms = row_uniforms(5, seed=0, family="response", key="x")
    rows = head.sparse_rows(hidden, labels=None, selection=TopK(300), uniforms=uniforms, rows_per_chunk=8)
    rows.validate(300)
    expected = torch.log_softmax(hidden @ weight[:300].T, dim=-1)
    np.testing.assert_allclose(rows.logprobs[:300], expected[0].sort(descending=True).values, atol=1e-5)
    np.testing.assert_allclose(rows.tail_mass, 0, atol=1e-7)


def test_a_tied_head_is_the_input_embedding(tmp_path: Path) -> None:
    tensors = {"language_model.model.embed_tokens.weight": random(20, 4)}
    for folder, config in (("told", {"text_config": {"tie_word_embeddings": True}}), ("silent", {})):
        (tmp_path / folder).mkdir()
        head = read_head(write_checkpoint(tmp_path / folder, tensors, **config), vocab_size=20)
        assert torch.equal(head.weight, random(20, 4))
    both = {**tensors, "language_model.lm_head.weight": random(20, 4, seed=5)}
    (tmp_path / "both").mkdir()
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}
    head = read_head(write_checkpoint(tmp_path / "both", both, **config), vocab_size=20)
    assert torch.equal(head.weight, random(20, 4, seed=5))


def test_scale_soft_cap_and_bias_come_from_the_checkpoint(tmp_path: Path) -> None:
    tensors = {"lm_head.weight": random(20, 4).to(torch.bfloat16), "lm_head.bias": random(20)}
    config = {"text_config": {"logits_scaling": 4.0, "final_logit_softcapping": 30.0}}
    head = read_head(write_checkpoint(tmp_path, tensors, **config), vocab_size=10)
    assert (head.scale, head.soft_cap) == (0.25, 30.0)
    assert head.weight.dtype == torch.float32
    assert head.bias is not None
    assert torch.equal(head.bias, random(20)[:10])


def test_a_checkpoint_without_a_fitting_head_is_refused(tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path, {"lm_head.weight": random(10, 4)})
    with pytest.raises(StillhouseError, match="10 rows, the tokenizer 11"):
        read_head(small, vocab_size=11)
    untied = write_checkpoint(tmp_path, {"embed_tokens.weight": random(10, 4)}, tie_word_embeddings=False)
    with pytest.raises(StillhouseError, match="found none"):
        read_head(untied, vocab_size=10)
