from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from storage.errors import StillhouseError
from storage.processes import torchvision_shim
from storage.selection import Threshold, TopK
from teacher_dump.signals.lm_head import ChunkSize, OutputHead, find_head, read_head
from teacher_dump.signals.row_selector import RowSelector, SelectedRows
from teacher_dump.signals.spec import RowRequest


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 1000])
@pytest.mark.parametrize("selection", [TopK(4), Threshold(0.05)])
def test_chunks_change_nothing(rows_per_chunk: int, selection: TopK | Threshold) -> None:
    weight, hidden, labels = random(50, 8), random(20, 8, seed=1), torch.arange(20)

    def select(size: int, **states: torch.Tensor) -> SelectedRows:
        head = OutputHead(weight, chunk_size=ChunkSize(size))
        selector = RowSelector(head, "response", RowRequest(selection, seed=0))
        return selector.select(states, labels=labels[: sum(map(len, states.values()))], sums_tails=True)

    whole, cut = select(20, x=hidden), select(rows_per_chunk, x=hidden)
    assert cut.rows[0].ids.tolist() == whole.rows[0].ids.tolist()
    np.testing.assert_allclose(cut.rows[0].logprobs, whole.rows[0].logprobs, atol=1e-5)
    assert cut.tail is not None
    assert whole.tail is not None
    np.testing.assert_allclose(cut.tail.total, whole.tail.total, rtol=1e-5)
    assert (cut.tail.num_rows, whole.tail.num_rows) == (20, 20)
    assert [rows.num_rows for rows in select(rows_per_chunk, x=hidden[:0]).rows] == [0]
    assert select(rows_per_chunk).rows == []
    one, other = select(rows_per_chunk, x=hidden[:6], y=hidden[6:]).rows  # of several chunks, but one array
    assert (one.num_rows, other.num_rows) == (6, 14)
    assert one.ids.base is other.ids.base
    assert one.logprobs.base is other.logprobs.base


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
    (rows,) = RowSelector(head, "response", RowRequest(TopK(300), seed=0)).select({"x": hidden}).rows
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


def test_a_head_that_is_called_tied_must_be_the_embedding(tmp_path: Path) -> None:
    weight = random(9000, 2)
    for folder, head in (("same", weight.clone()), ("other", weight + torch.eye(9000, 2) * 0.01)):
        (tmp_path / folder).mkdir()
        tensors = {"model.embed_tokens.weight": weight, "lm_head.weight": head}
        write_checkpoint(tmp_path / folder, tensors, tie_word_embeddings=True)
    assert find_head(tmp_path / "same", vocab_size=9000).weight == "lm_head.weight"
    with pytest.raises(StillhouseError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        find_head(tmp_path / "other", vocab_size=9000)


TINY: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("qwen2", {"tie_word_embeddings": True}, (1.0, None)),
        ("gemma2", {}, (1.0, 30.0)),
        ("cohere", {"logit_scale": 0.25}, (0.25, None)),
        ("granite", {"logits_scaling": 8.0}, (0.125, None)),
        ("hyperclovax", {"logits_scaling": 0.5}, (0.5, None)),
        ("phi", {}, (1.0, None)),  # its head has a bias
    ],
)
def test_our_head_is_the_models_own(
    kind: str, settings: dict[str, Any], expected: tuple[float, float | None], tmp_path: Path
) -> None:
    """Hidden states of a model of transformers through our head, against the logits that it gives itself."""
    torchvision_shim.import_torch_companions()
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY, **settings)).eval()
    with torch.no_grad():
        for parameter in (*model.get_output_embeddings().parameters(), *model.base_model.parameters()):
            parameter.normal_(0, 0.5)  # far enough for a soft-cap to be felt
    model.save_pretrained(tmp_path)
    head = read_head(tmp_path, vocab_size=80)
    assert (head.scale, head.soft_cap, head.bias is not None) == (*expected, kind == "phi")
    ids = torch.arange(12)[None] * 7
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0]
        logits = model(ids).logits[0, :, :80]
    np.testing.assert_allclose(head.logits(hidden), logits, atol=1e-4)


def test_unsupported_logits_are_refused_by_name(tmp_path: Path) -> None:
    for config, message in (
        ({"model_type": "minicpm", "dim_model_base": 256}, "minicpm computes its logits.*dim_model_base"),
        ({"logit_scale": "inv_sqrt_d_model"}, "inv_sqrt_d_model.*expected a number"),
        ({"final_logit_softcapping": 0}, "is 0, expected a number"),
    ):
        folder = write_checkpoint(tmp_path, {"lm_head.weight": random(10, 4)}, **config)
        with pytest.raises(StillhouseError, match=message):
            find_head(folder, vocab_size=10)


def test_no_more_than_a_chunk_of_logits_is_in_memory() -> None:
    """Every live tensor of scoring counts: a handful of [rows_per_chunk, v], and little more for more rows."""
    vocab_size, rows_per_chunk = 4000, 32
    head = OutputHead(random(vocab_size, 8), soft_cap=30.0, chunk_size=ChunkSize(rows_per_chunk))
    selector = RowSelector(head, "response", RowRequest(Threshold(0.05), seed=0, temperatures=(0.5, 2.0)))
    head.logits(random(1, 8))  # which packs the head for good

    def peak(num_rows: int) -> int:
        hidden, labels = random(num_rows, 8, seed=1), torch.arange(num_rows)
        with LiveBytes() as live:
            selector.select({"x": hidden}, labels=labels)
        return live.peak

    chunk = rows_per_chunk * vocab_size * 4
    few, many = peak(2 * rows_per_chunk), peak(20 * rows_per_chunk)
    assert chunk < few < 8 * chunk
    # The selected entries of all rows wait for the last chunk, to be joined once: some hundred bytes a row.
    assert many - few < 0.05 * 18 * chunk


def test_the_count_of_live_tensors_counts() -> None:
    with LiveBytes() as live:
        whole = torch.zeros(1000)
        del whole
        parts = [torch.zeros(100), torch.zeros(100)]
        parts[0] += 1
    assert live.peak == 4000
    assert live.now == 800


class LiveBytes(TorchDispatchMode):
    """Counts bytes of live storages that torch made in this mode, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        if place in self._known or not storage.nbytes():
            return
        self._known.add(place)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place, storage.nbytes())

    def _forget(self, place: int, num_bytes: int) -> None:
        self._known.discard(place)
        self.now -= num_bytes


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


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {"lm_head.weight": random(10, 4).to(torch.float8_e4m3fn)},
            {},
            "lm_head.weight is stored as F8_E4M3, expected one of F64, F32, F16, BF16",
        ),
        (
            {"lm_head.weight": random(10, 4).to(torch.float8_e4m3fn), "lm_head.weight_scale": random(10, 1)},
            {},
            "output head has lm_head.weight_scale, expected nothing but weight and bias",
        ),
        (  # GPTQ and AWQ, with an input embedding that looks like a tied head
            {
                "model.embed_tokens.weight": random(10, 4),
                "lm_head.qweight": torch.zeros(1, 10, dtype=torch.int32),
                "lm_head.scales": random(1, 10),
            },
            {},
            "output head has lm_head.qweight, lm_head.scales",
        ),
        (
            {"language_model.lm_head.weight": random(10, 4), "language_model.lm_head.lora_A.weight": random(2, 4)},
            {},
            "output head has language_model.lm_head.lora_A.weight",
        ),
        (
            {"model.embed_tokens.weight": random(10, 4), "model.embed_tokens.weight_scale": random(10, 1)},
            {"tie_word_embeddings": True},
            "output head has model.embed_tokens.weight_scale",
        ),
        ({"lm_head.weight": random(10, 4)}, {"hidden_size": 8}, r"shape \[10, 4\], expected \[vocabulary, 8\]"),
        ({"lm_head.weight": random(10)}, {}, r"shape \[10\], expected \[vocabulary, hidden_size\]"),
        (
            {"lm_head.weight": torch.zeros(10, 4, dtype=torch.int8)},
            {},
            "stored as I8",
        ),
    ],
)
def test_a_head_that_is_not_a_plain_matrix_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], message: str
) -> None:
    folder = write_checkpoint(tmp_path, tensors, **config)
    with pytest.raises(StillhouseError, match=message):
        find_head(folder, vocab_size=10)
