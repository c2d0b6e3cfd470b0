"""A student composed of a tower, a decoder and a new projector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from storage.errors import ConfigError
from student_train.composition import compose, ensure_composed
from student_train.config import CompositionSection
from student_train.huggingface import load_weights, transformers_module
from student_train.models import read_checkpoint
from tests.student_train.conftest import Runner
from tests.tiny import make_tiny_llava, make_tiny_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict[str, str]:
    """A whole SigLIP, a tied Qwen2 of fewer rows than the tokenizer has, and a teacher's processor."""
    transformers = transformers_module()
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    siglip = transformers.SiglipConfig(
        vision_config={**sizes, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
        text_config={**sizes, "num_hidden_layers": 1, "vocab_size": 50},
    )
    transformers.SiglipModel(siglip).save_pretrained(root / "siglip")
    qwen = transformers.Qwen2Config(
        **sizes, num_hidden_layers=2, num_key_value_heads=2, vocab_size=280, tie_word_embeddings=True,
        max_position_embeddings=256, eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(qwen).save_pretrained(root / "qwen")
    return {"vision": str(root / "siglip"), "llm": str(root / "qwen"), "processor": str(checkpoint)}


def test_the_parts_are_kept_and_the_projector_follows_the_seed(parts: dict[str, str], tmp_path: Path) -> None:
    section = CompositionSection.model_validate(parts)
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        ensure_composed(section, tmp_path / name, seed=seed, is_first=True)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    decoder, tower = (load_file(Path(parts[part]) / "model.safetensors") for part in ("llm", "vision"))
    assert torch.equal(
        a["language_model.model.layers.1.mlp.up_proj.weight"], decoder["model.layers.1.mlp.up_proj.weight"]
    )
    assert torch.equal(a["language_model.model.embed_tokens.weight"][:280], decoder["model.embed_tokens.weight"])
    assert len(a["language_model.model.embed_tokens.weight"]) == 300
    layer = "encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(a[f"vision_tower.vision_model.{layer}"], tower[f"vision_model.{layer}"])
    assert all(torch.equal(a[name], b[name]) for name in a)
    differing = {name for name in a if not torch.equal(a[name], c[name])}
    assert differing == {f"multi_modal_projector.linear_{layer}.weight" for layer in (1, 2)}
    described = read_checkpoint(tmp_path / "a")
    assert described.grid.tokens_per_image == 16
    assert load_weights(tmp_path / "a").lm_head.weight.shape == (300, 64)


def test_what_is_there_is_left_alone(parts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    ensure_composed(CompositionSection.model_validate(parts), tmp_path / "made", seed=0, is_first=True)
    assert not list((tmp_path / "made").iterdir())


def test_three_stages_from_parts(parts: dict[str, str], make_runner: Callable[..., Runner]) -> None:
    """LLaVA-KD's own: the projector alone, then the decoder too, each stage from the last one's checkpoint."""
    kd = {"response": {}, "visual": {}, "relation": {"weight": 0.5}}
    runner = make_runner(
        dpt={"init": "{run}/composed", "compose": parts, "train": ["projector"], "losses": kd},
        sft={"init": "{run}/dpt-0"},
        dft={"init": "{run}/sft-0", "losses": kd},
    )
    for outcome in runner.run_in_turn(("dpt",), ("sft",), ("dft",)):
        assert outcome.code == 0, outcome.stderr
    composed = load_file(runner.folder / "runs" / "t" / "composed" / "model.safetensors")
    dpt, dft = (load_file(runner.output(stage) / "model.safetensors") for stage in ("dpt", "dft"))
    changed = {name for name in dpt if not torch.equal(dpt[name], composed[name])}
    assert changed
    assert all(name.startswith("multi_modal_projector.") for name in changed)
    assert all(torch.equal(dft[name], dpt[name]) for name in dft if name.startswith("vision_tower."))


def test_parts_that_do_not_go_together_are_refused(parts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compose\.vision: .* is a 'qwen2'"):
        compose(CompositionSection.model_validate({**parts, "vision": parts["llm"]}), seed=0)
    make_tiny_llava(tmp_path / "text")
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer_only")
    with pytest.raises(Exception, match="processor"):
        compose(CompositionSection.model_validate({**parts, "processor": str(tmp_path / "tokenizer_only")}), seed=0)
