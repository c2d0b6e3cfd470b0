"""A pruned decoder: layers and widths that stay are copied, what adds nothing goes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from storage.errors import ConfigError
from student_train.config import PruneSection
from student_train.models.huggingface import import_transformers, load_weights
from student_train.models.prune import check_pruning, ensure_pruned, keep_most_changing, prune, space_layers
from tests.tiny import make_tiny_llava, make_tiny_tokenizer

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "eos_token_id": 1, "bos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(2, 26).view(2, 12)


class GivenChanges:
    """Says that layers change the hidden state so much."""

    def __init__(self, *changes: float) -> None:
        self.changes = changes

    def describe(self) -> Mapping[str, Any]:
        return {"changes": list(self.changes)}

    def measure(self, model: Any, layers: Sequence[nn.Module]) -> Sequence[float]:
        assert len(self.changes) == len(layers)
        return self.changes


UNUSED = GivenChanges()


def make_decoder(kind: str, folder: Path, **options: Any) -> Any:
    """Save a random decoder with a tokenizer; return the model."""
    transformers = import_transformers()
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # biases and gains are random too
    save(model, folder)
    return model


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)


def make_section(folder: Path, **fields: Any) -> PruneSection:
    return PruneSection.model_validate({"model": str(folder), **fields})


@torch.no_grad()
def compute_logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def clear_rows(layer: Any, rows: Tensor) -> None:
    layer.weight[rows] = 0
    if layer.bias is not None:
        layer.bias[rows] = 0


KINDS = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen3", {"head_dim": 32}),
    ("Mistral", {}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_all_layers_and_full_width_change_nothing(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = make_decoder(kind, tmp_path / "whole", **options)
    section = make_section(tmp_path / "whole", layers=4, width={"intermediate_size": 96, "hidden_size": 64})
    check_pruning(section, "stages.a")
    ensure_pruned(section, tmp_path / "pruned", measure=UNUSED)
    torch.testing.assert_close(compute_logits(load_weights(tmp_path / "pruned")), compute_logits(model))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_neurons_and_channels_without_weight_go_first_and_cost_nothing(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make_decoder(kind, tmp_path / "whole", rms_norm_eps=1e-9, **options)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            dead = torch.randperm(96, generator=draw)[:40]
            if number % 3 == 2:
                layer.mlp.down_proj.weight[:, dead] = 0
            else:
                clear_rows((layer.mlp.gate_proj, layer.mlp.up_proj)[number % 3], dead)
        empty = torch.randperm(64, generator=draw)[:24]
        model.model.embed_tokens.weight[:, empty] = 0
        for layer in model.model.layers:
            clear_rows(layer.self_attn.o_proj, empty)
            clear_rows(layer.mlp.down_proj, empty)
    save(model, tmp_path / "whole")
    section = make_section(tmp_path / "whole", width={"intermediate_size": 56, "hidden_size": 40})
    ensure_pruned(section, tmp_path / "pruned", measure=UNUSED)
    pruned = load_weights(tmp_path / "pruned")
    assert pruned.model.layers[3].mlp.up_proj.weight.shape == (56, 40)
    assert pruned.model.layers[0].self_attn.q_proj.weight.shape == (64, 40)  # heads stay
    torch.testing.assert_close(compute_logits(pruned), compute_logits(model), rtol=1e-4, atol=1e-4)


def test_layers_that_do_nothing_go_by_least_change_and_cost_nothing(tmp_path: Path) -> None:
    model = make_decoder("Llama", tmp_path / "whole")
    with torch.no_grad():
        for number in (1, 2):
            model.model.layers[number].self_attn.o_proj.weight.zero_()
            model.model.layers[number].mlp.down_proj.weight.zero_()
    save(model, tmp_path / "whole")
    section = make_section(tmp_path / "whole", layers=2, choose="least_change")
    pruned = prune(section, measure=GivenChanges(0.3, 0.0, 0.0, 0.1))
    torch.testing.assert_close(compute_logits(pruned), compute_logits(model))


def test_spaced_layers_by_hand() -> None:
    assert space_layers(30, 8) == (0, 4, 8, 12, 17, 21, 25, 29)
    assert space_layers(24, 12) == (0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23)
    assert space_layers(5, 5) == (0, 1, 2, 3, 4)
    assert space_layers(7, 1) == (0,)
    assert keep_most_changing([0.3, 0.1, 0.1, 0.2], 3) == (0, 1, 3)


@given(num_layers=st.integers(1, 200), data=st.data())
def test_spaced_layers_hold_both_ends_and_rise_evenly(num_layers: int, data: st.DataObject) -> None:
    num_kept = data.draw(st.integers(min(2, num_layers), num_layers))
    chosen = space_layers(num_layers, num_kept)
    assert (chosen[0], chosen[-1], len(chosen)) == (0, num_layers - 1, num_kept)
    steps = {after - before for before, after in pairwise(chosen)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


def test_layers_that_stay_are_copied_with_their_kind_of_attention(tmp_path: Path) -> None:
    model = make_decoder("Qwen2", tmp_path / "whole", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    ensure_pruned(make_section(tmp_path / "whole", layers=[0, 3]), tmp_path / "pruned", measure=UNUSED)
    pruned = load_weights(tmp_path / "pruned")
    assert pruned.config.layer_types == ["full_attention", "sliding_attention"]
    assert (pruned.config.num_hidden_layers, pruned.config.max_window_layers) == (2, 1)
    model.model.layers = nn.ModuleList([model.model.layers[0], model.model.layers[3]])
    model.config.layer_types, model.config.num_hidden_layers = pruned.config.layer_types, 2
    torch.testing.assert_close(compute_logits(pruned), compute_logits(model))


def test_lists_with_an_item_for_each_layer_follow_the_layers(tmp_path: Path) -> None:
    make_decoder("SmolLM3", tmp_path / "whole", no_rope_layer_interval=2)
    section = make_section(tmp_path / "whole", layers=[1, 2])
    check_pruning(section, "stages.a")
    ensure_pruned(section, tmp_path / "pruned", measure=UNUSED)
    assert load_weights(tmp_path / "pruned").config.no_rope_layers == [0, 1]


def test_a_layer_that_would_be_another_at_its_new_place_is_refused(tmp_path: Path) -> None:
    """Its pattern says by a layer's number whether that attends or is recurrent."""
    make_decoder("RecurrentGemma", tmp_path / "whole", block_types=["recurrent", "attention"], lru_width=64)
    check_pruning(make_section(tmp_path / "whole", layers=[0, 3]), "stages.a")
    section = make_section(tmp_path / "whole", layers=[1, 2])
    words = "layer 1 of .* would be another at its new place 0: its .*temporal_block"
    with pytest.raises(ConfigError, match=rf"^stages\.a: prune\.model: {words}"):
        check_pruning(section, "stages.a")
    with pytest.raises(ConfigError, match=words):
        prune(section, measure=UNUSED)


def test_what_cannot_be_pruned_is_refused_by_name(tmp_path: Path) -> None:
    make_decoder("GptOss", tmp_path / "experts", num_local_experts=2, head_dim=32)
    with pytest.raises(ConfigError, match=r"^stages\.a: .*'gpt_oss' with experts \(num_experts is 2\)"):
        check_pruning(make_section(tmp_path / "experts", layers=2), "stages.a")
    make_decoder("Gemma", tmp_path / "gemma", head_dim=32)
    check_pruning(make_section(tmp_path / "gemma", layers=2, width={"intermediate_size": 64}), "stages.a")
    with pytest.raises(ConfigError, match=r"prune\.width\.hidden_size: .* is a 'gemma' .* expected one of llama"):
        check_pruning(make_section(tmp_path / "gemma", width={"hidden_size": 32}), "stages.a")
    with pytest.raises(ConfigError, match=r"^stages\.a: .*nowhere"):
        check_pruning(make_section(tmp_path / "nowhere", layers=2), "stages.a")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": 5}, r"prune\.layers is 5, but .* has only 4"),
        ({"layers": [0, 4]}, r"prune\.layers names layer 4, but .* has 4"),
        ({"width": {"intermediate_size": 97}}, r"prune\.width\.intermediate_size is 97, but that of .* is 96"),
        ({"width": {"hidden_size": 65}}, r"prune\.width\.hidden_size is 65, but that of .* is 64"),
        ({"width": {"hidden_size": 41}}, r"prune\.width\.hidden_size is 41, which .* cannot have: .*attention heads"),
    ],
)
def test_more_than_there_is_is_refused_without_reading_weights(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    make_decoder("Llama", tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^stages\.a: " + words):
        check_pruning(make_section(tmp_path / "whole", **fields), "stages.a")


def test_the_tower_stays_and_the_projector_follows_the_width(tmp_path: Path) -> None:
    whole = load_weights(make_tiny_llava(tmp_path / "whole", num_layers=3))
    inner = torch.arange(64) % 4 != 0
    empty = torch.arange(64) % 2 == 0
    with torch.no_grad():
        projector, decoder = whole.model.multi_modal_projector, whole.model.language_model
        clear_rows(projector.linear_1, inner)
        clear_rows(projector.linear_2, empty)
        for layer in decoder.layers:
            clear_rows(layer.self_attn.o_proj, empty)
            clear_rows(layer.mlp.down_proj, empty)
        decoder.embed_tokens.weight.mul_(50)  # beside tiny ones the norms' epsilon counts
        decoder.embed_tokens.weight[:, empty] = 0
    whole.save_pretrained(tmp_path / "whole")
    section = make_section(tmp_path / "whole", layers=[0, 1, 2], width={"hidden_size": 40, "intermediate_size": 128})
    ensure_pruned(section, tmp_path / "pruned", measure=UNUSED)
    pruned = load_weights(tmp_path / "pruned")
    ids = torch.cat([torch.full((1, 16), whole.config.image_token_id), IDS[:1]], dim=1)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, pixel_values=pixels).logits for model in (pruned, whole))
    assert pruned.model.multi_modal_projector.linear_2.weight.shape == (40, 40)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_changed_pruning_is_refused_or_replaced(tmp_path: Path) -> None:
    make_decoder("Llama", tmp_path / "whole")
    folder = tmp_path / "pruned"
    ensure_pruned(make_section(tmp_path / "whole", layers=3), folder, measure=UNUSED)
    ensure_pruned(make_section(tmp_path / "whole", layers=3, slice=7), folder, measure=UNUSED)  # not used
    changed = make_section(tmp_path / "whole", layers=2, choose="least_change")
    with pytest.raises(ConfigError, match=r"prune\.layers: was 3, is 2"):
        ensure_pruned(changed, folder, measure=GivenChanges(1, 2, 3, 4))
    ensure_pruned(changed, folder, measure=GivenChanges(1, 2, 3, 4), replaces=True)
    with pytest.raises(ConfigError, match=r"prune\.samples\.changes: was"):
        ensure_pruned(changed, folder, measure=GivenChanges(4, 3, 2, 1))
    assert load_weights(folder).config.num_hidden_layers == 2
    assert {item.name for item in tmp_path.iterdir()} == {"whole", "pruned"}
