"""What is unknown or cannot be mapped is refused by its name, and then nothing is left."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.conversion.conversion import Options
from stillhouse.conversion.convert import convert
from storage.errors import ConfigError
from tests.stillhouse.conversion import foreign_checkpoints as foreign

PART = "language_model/pytorch_model.bin"


def refuse(source: Path, match: str, options: Options | None = None) -> None:
    """The conversion is refused with this message and leaves nothing beside the source."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(ConfigError, match=match):
        convert(source, source.parent / "deep" / "target", options)
    assert sorted(source.parent.iterdir()) == before


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def apply(source: Path) -> None:
        tensors = torch.load(source / PART, weights_only=True)
        change(tensors)
        torch.save(tensors, source / PART)

    return apply


def change_config(**keys: Any) -> Callable[[Path], Any]:
    def apply(source: Path) -> None:
        document = json.loads((source / "config.json").read_text())
        foreign.save_json(source / "config.json", document | keys)

    return apply


def pickle_code(source: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return (print, ("code of a checkpoint ran",))

    torch.save({"model.norm.weight": Runs()}, source / PART)


def pickle_code_without_torch(source: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return (print, ("code of a checkpoint ran",))

    with (source / PART).open("wb") as file:
        pickle.dump({"model.norm.weight": Runs()}, file)


def name_code(source: Path) -> None:
    """Give the tokenizer a class of its own, whose module would say that it ran."""
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    foreign.save_json(source / "tokenizer_config.json", settings)
    (source / "own.py").write_text("print('code of a checkpoint ran')\nclass Own: pass\n")
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text("{}")


def enlarge_vocabulary(source: Path) -> None:
    tokenizer = foreign.make_tiny_tokenizer(foreign.QWEN_TOKENS, image_token=None)
    tokenizer.add_tokens([f"more{number}" for number in range(40)])
    tokenizer.save_pretrained(source)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (
            change_tensors(lambda t: t.update({"model.layers.0.extra.weight": torch.ones(3)})),
            r"1 unknown tensors; .*\n  language_model\.model\.layers\.0\.extra\.weight \(3,\)",
        ),
        (
            change_tensors(lambda t: t.update({"lora_A.weight": torch.ones(3)})),
            r"unknown tensors; .*\n  language_model\.lora_A\.weight",
        ),
        (
            change_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
            r"1 missing tensors .*\n  language_model\.model\.layers\.1\.mlp\.up_proj\.weight \(96, 64\)",
        ),
        (
            change_tensors(lambda t: t.update({"model.norm.weight": torch.ones(63)})),
            r"norm\.weight has \(63,\), .* expected \(64,\)",
        ),
        (
            change_tensors(lambda t: t.update({"lm_head.weight": torch.ones(320, 64)})),
            r"language_model\.lm_head\.weight differs from language_model\.model\.embed_tokens\.weight.*ties them",
        ),
        (
            change_tensors(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})),
            r"norm\.weight has dtype torch\.int8.*quantised",
        ),
        (pickle_code, r"Python objects besides tensors"),
        (pickle_code_without_torch, r"Python objects besides tensors"),
        (lambda source: torch.save(torch.ones(3), source / PART), r"holds a Tensor, expected tensors by name"),
        (lambda source: torch.save({"epoch": 3}, source / PART), r"holds no tensor under 'epoch'"),
        (name_code, r"tokenizer cannot be read"),
        (enlarge_vocabulary, r"the tokenizer has 341 tokens with <image>, but the decoder 320 rows"),
        (lambda source: (source / PART).write_bytes(b"not a file of weights"), r"pytorch_model\.bin"),
        (lambda source: (source / PART).unlink(), r"no weights are here"),
        (lambda source: (source / "adapter_config.json").touch(), r"LoRA adapter .*merge it first"),
        (change_config(connector_type="qformer"), r"connector_type is 'qformer', expected mlp2x_gelu"),
        (change_config(vision_feature_select_strategy="all"), r"vision_feature_select_strategy is 'all'"),
        (change_config(vision_model_name_or_path2="dinov2"), r"two towers"),
        (change_config(image_aspect_ratio="anyres"), r"image_aspect_ratio is 'anyres'"),
        (change_config(text_config={"model_type": "phi"}), r"a 'phi': its output head has a bias"),
        (change_config(text_config=None), r"config\.json: has no text_config"),
        (change_config(model_type="unheard_of"), r"(?s)model_type 'unheard_of'.*connector_type.*known formats:.*LLaVA"),
        (change_config(model_type="llava"), r"transformers' own format"),
        (lambda source: (source / "config.json").unlink(), r"(?s)no config\.json; it holds .*known formats"),
        (lambda source: (source / "tokenizer.json").unlink(), r"--tokenizer DIR"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], Any], match: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    foreign.make_tinyllava(source, parts=True)
    damage(source)
    refuse(source, match)
    assert "code of a checkpoint ran" not in capfd.readouterr().out


def test_shards_that_are_missing_or_cut_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    foreign.make_tinyllava(source)
    shard = source / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    refuse(source, r"model-00002-of-00002\.safetensors: is not a whole safetensors file")
    shard.unlink()
    refuse(source, r"lacks model-00002-of-00002\.safetensors")


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"mm_projector_type": "linear"}, r"mm_projector_type is 'linear'"),
        ({"image_aspect_ratio": "anyres_max_9"}, r"image_aspect_ratio is 'anyres_max_9'.*llava-hf"),
        ({"mm_use_im_start_end": True}, r"mm_use_im_start_end is True"),
        ({"mm_vision_tower": "someone/unknown"}, r"someone/unknown, which is neither .*--vision-tower DIR"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, r"shapes that do not fit config\.json|missing"),
    ],
)
def test_keys_of_llava_that_cannot_be_mapped_are_refused(tmp_path: Path, keys: dict[str, Any], match: str) -> None:
    foreign.make_llava(tmp_path / "source", **keys)
    refuse(tmp_path / "source", match)


@pytest.mark.parametrize(
    ("moe", "match"),
    [
        ({"use_residual": True}, r"moe\.use_residual is set"),
        ({"num_experts": [4, 2]}, r"moe\.num_experts is \[4, 2\]"),
        ({"top_k_experts": 3}, r"moe\.top_k_experts is 3"),
        ({"moe_layers_idx": [7]}, r"moe\.moe_layers_idx is \[7\]"),
        ({"num_experts": [5]}, r"missing tensors .*\n  language_model\.model\.layers\.0\.mlp\.experts\.4\."),
    ],
)
def test_mixtures_that_cannot_be_mapped_are_refused(tmp_path: Path, moe: dict[str, Any], match: str) -> None:
    foreign.make_moe_llava(tmp_path / "source", moe=moe)
    refuse(tmp_path / "source", match)


def test_a_capacity_that_drops_tokens_in_evaluation_is_said(tmp_path: Path) -> None:
    foreign.make_moe_llava(tmp_path / "source", moe={"eval_capacity_factor": 1.0})
    notes = "\n".join(convert(tmp_path / "source", tmp_path / "target").notes)
    assert "in evaluation the source drops tokens beyond 50% of a batch for each expert" in notes


def test_the_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = foreign.make_tinyllava(source)
    name = "language_model.model.norm.weight"
    for shard in source.glob("*.safetensors"):
        save_file({name: tensors[name]}, shard)
    refuse(source, r"norm\.weight is also in")
