"""A student composed of a tower, a decoder and a new projector."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from storage.errors import ConfigError
from student_train.config import CompositionSection, StageSection
from student_train.models.checkpoint_contents import describe_checkpoint
from student_train.models.compose import check_composition, compose, ensure_composed
from student_train.models.huggingface import import_transformers, load_weights
from student_train.models.loading import read_checkpoint
from student_train.training.stage_inputs import collect_init_inputs
from tests.student_train.conftest import Runner
from tests.tiny import make_tiny_llava, make_tiny_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict[str, str]:
    """A whole SigLIP, a tied Qwen2 with fewer rows than the tokenizer has tokens, and a teacher's processor."""
    transformers = import_transformers()
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
        ensure_composed(section, tmp_path / name, seed=seed)
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
    assert described.sequence_format.tokens_per_image == 16
    assert load_weights(tmp_path / "a").lm_head.weight.shape == (300, 64)


def test_a_checkpoint_of_unknown_inputs_is_kept_with_a_warning(
    parts: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "made").mkdir()
    ensure_composed(CompositionSection.model_validate(parts), tmp_path / "made", seed=0, replaces=True)
    assert not list((tmp_path / "made").iterdir())
    assert "so its inputs are unknown" in caplog.text


def test_a_changed_composition_is_refused_with_its_fields_or_replaced(parts: dict[str, str], tmp_path: Path) -> None:
    folder, section = tmp_path / "made", CompositionSection.model_validate(parts)
    ensure_composed(section, folder, seed=0)
    before = (folder / "model.safetensors").read_bytes()
    moved = tmp_path / "moved"
    shutil.copytree(parts["llm"], moved)
    ensure_composed(CompositionSection.model_validate({**parts, "llm": str(moved)}), folder, seed=0)  # the same parts
    changed = CompositionSection.model_validate({**parts, "feature_layer": -1})
    with pytest.raises(ConfigError, match=r"compose\.feature_layer: was -2, is -1"):
        ensure_composed(changed, folder, seed=0)
    with pytest.raises(ConfigError, match=r"compose\.seed: was 0, is 1"):
        ensure_composed(section, folder, seed=1)
    assert (folder / "model.safetensors").read_bytes() == before
    ensure_composed(section, folder, seed=1, replaces=True)
    assert (folder / "model.safetensors").read_bytes() != before
    ensure_composed(section, folder, seed=1)
    assert {item.name for item in tmp_path.iterdir()} == {"made", "moved"}


@pytest.mark.parametrize("fails_at", ["the parts", "the check"])
def test_a_failed_composition_leaves_nothing_behind(parts: dict[str, str], tmp_path: Path, fails_at: str) -> None:
    def refuse(new: Path) -> None:
        assert (new / "model.safetensors").is_file()
        raise ConfigError(f"{new} does not fit")

    folder = tmp_path / "a" / "b" / "made"
    given = {**parts, "vision": parts["llm"]} if fails_at == "the parts" else parts
    words = r"compose\.vision" if fails_at == "the parts" else f"^{folder} does not fit$"
    with pytest.raises(ConfigError, match=words):
        ensure_composed(CompositionSection.model_validate(given), folder, seed=0, check=refuse)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["vision", "llm", "processor"])
def test_check_opens_what_compose_names(parts: dict[str, str], tmp_path: Path, part: str) -> None:
    check_composition(CompositionSection.model_validate(parts), "stages.a")
    (tmp_path / "empty").mkdir()
    wrong = {"vision": parts["llm"], "llm": parts["vision"], "processor": str(tmp_path / "empty")}
    with pytest.raises(ConfigError, match=rf"^stages\.a: .*{wrong[part]}"):
        check_composition(CompositionSection.model_validate({**parts, part: wrong[part]}), "stages.a")


def test_three_stages_from_parts(parts: dict[str, str], make_runner: Callable[..., Runner]) -> None:
    """LLaVA-KD's stages: first the projector alone, then the decoder too, each from the checkpoint before."""
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


def test_parts_that_do_not_fit_are_refused(parts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compose\.vision: .* is a 'qwen2'"):
        compose(CompositionSection.model_validate({**parts, "vision": parts["llm"]}), seed=0)
    make_tiny_llava(tmp_path / "text")
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer_only")
    with pytest.raises(Exception, match="processor"):
        compose(CompositionSection.model_validate({**parts, "processor": str(tmp_path / "tokenizer_only")}), seed=0)


def test_what_a_stage_starts_from_is_the_same_before_and_after_its_student_is_composed(
    parts: dict[str, str], tmp_path: Path
) -> None:
    """So that finished runs of an ablation are not repeated."""
    place = tmp_path / "composed"
    stage = StageSection.model_validate({"init": str(place), "steps": 1, "compose": parts})
    assert stage.compose is not None
    before = collect_init_inputs(stage, stage.init)
    ensure_composed(stage.compose, place, seed=0)
    (place / "evaluation.json").write_text("{}")
    assert collect_init_inputs(stage, stage.init) == before
    changed = stage.model_copy(update={"compose": stage.compose.model_copy(update={"llm": str(place)})})
    assert collect_init_inputs(changed, stage.init) != before


def test_what_is_written_beside_a_checkpoint_is_no_part_of_it(parts: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(parts["llm"], folder)
    before = describe_checkpoint(folder)
    assert before == describe_checkpoint(parts["llm"])
    (folder / "evaluation.json").write_text("{}")
    (folder / "summary.json").write_text("{}")
    assert describe_checkpoint(folder) == before
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    assert [name for name in before if describe_checkpoint(folder)[name] != before[name]] == ["config"]
