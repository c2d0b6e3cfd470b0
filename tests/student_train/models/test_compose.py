"""A student composed of a tower, a decoder and a new projector."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from storage.errors import ConfigError
from student_train.config import CompositionSection, StageSection
from student_train.models.checkpoint_contents import describe_checkpoint
from student_train.models.compose import check_composition, compose, ensure_composed
from student_train.models.huggingface import import_transformers, load_processor, load_weights
from student_train.models.loading import freeze, read_checkpoint
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


@pytest.mark.parametrize("record", ["[]", "null", '{"made_by": "merge"}', '{"made_by": []}'])
def test_a_record_that_is_none_of_ours_is_refused(parts: dict[str, str], tmp_path: Path, record: str) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "composition.json").write_text(record)
    with pytest.raises(ConfigError, match=r"composition\.json: got .*, expected a record of compose or prune; remove"):
        ensure_composed(CompositionSection.model_validate(parts), tmp_path / "made", seed=0, replaces=True)


def test_a_tower_without_its_pooler_is_composed(parts: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    """As classification checkpoints of ViT are: no projector reads the pooler."""
    transformers = import_transformers()
    config = transformers.ViTConfig(**SMALL, intermediate_size=96, image_size=32, patch_size=8)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "tower")
    processor = write_processor(checkpoint, tmp_path / "processor", patch=8, extra=1)
    section = CompositionSection.model_validate({**parts, "vision": str(tmp_path / "tower"), "processor": processor})
    first, second = (compose(section, seed=0).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_batch_norms_keep_their_statistics_where_the_tower_trains(
    parts: dict[str, str], checkpoint: Path, tmp_path: Path
) -> None:
    tower = write_tower("ResNet", tmp_path / "tower", **TOWERS["ResNet"][0])
    processor = write_processor(checkpoint, tmp_path / "processor", patch=32, extra=0, size=64)
    model = compose(CompositionSection.model_validate({**parts, "vision": tower, "processor": processor}), seed=0)
    freeze(model, ("projector", "llm", "vision"))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(parameter.requires_grad for norm in norms for parameter in norm.parameters())
    before = [norm.state_dict()["running_mean"].clone() for norm in norms]
    model.model.vision_tower(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(norm.state_dict()["running_mean"], old) for norm, old in zip(norms, before, strict=True))


def test_a_map_needs_a_processor_that_counts_its_tokens_on_a_square(
    parts: dict[str, str], checkpoint: Path, tmp_path: Path
) -> None:
    tower = write_tower("ResNet", tmp_path / "tower", **TOWERS["ResNet"][0])
    write_processor(checkpoint, tmp_path / "processor", patch=32, extra=0, size=64)
    given = {**parts, "vision": tower, "processor": str(tmp_path / "processor")}
    for patch, width, words in (
        (None, 64, r"has patch_size null, so it cannot write the 4 image tokens"),
        (32, 96, r"makes 64 x 96 pixels, expected a square"),
    ):
        processor = load_processor(tmp_path / "processor")
        processor.patch_size, processor.image_processor.size = patch, {"height": 64, "width": width}
        processor.save_pretrained(tmp_path / f"{width}")
        section = CompositionSection.model_validate({**given, "processor": str(tmp_path / f"{width}")})
        with pytest.raises(ConfigError, match=r"stages\.a: compose\.processor: .*" + words):
            check_composition(section, "stages.a")


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


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MAPS = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
TOWERS: dict[str, tuple[dict[str, Any], int, int, str]] = {  # config, patch, tokens beside the patches, student
    "Dinov2": ({**SMALL, "image_size": 32, "patch_size": 8}, 8, 1, "llava"),
    "Dinov2WithRegisters": ({**SMALL, "image_size": 32, "patch_size": 8}, 8, 5, "llava"),
    "DINOv3ViT": ({**SMALL, "intermediate_size": 96, "image_size": 32, "patch_size": 8}, 8, 1, "llava"),
    "CLIPVision": ({**SMALL, "intermediate_size": 96, "image_size": 32, "patch_size": 8}, 8, 1, "llava"),
    "ResNet": ({**MAPS, "embedding_size": 8, "downsample_in_first_stage": False}, 32, 0, "fast_vlm"),
    "ConvNext": (MAPS, 32, 0, "fast_vlm"),
}


def write_tower(kind: str, folder: Path, **options: Any) -> str:
    transformers = import_transformers()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    return str(folder)


def write_processor(checkpoint: Path | str, folder: Path, *, patch: int, extra: int, size: int = 32) -> str:
    processor = load_processor(checkpoint)
    processor.patch_size, processor.num_additional_image_tokens = patch, extra
    processor.image_processor.size = {"height": size, "width": size}
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", TOWERS)
def test_any_tower_with_sequences_or_a_map_makes_a_student(
    parts: dict[str, str], checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    options, patch, extra, student = TOWERS[kind]
    size = 64 if student == "fast_vlm" else 32
    given = {
        **parts,
        "vision": write_tower(kind, tmp_path / "tower", **options),
        "processor": write_processor(checkpoint, tmp_path / "processor", patch=patch, extra=extra, size=size),
    }
    section = CompositionSection.model_validate(given)
    check_composition(section, "stages.a")
    ensure_composed(section, tmp_path / "made", seed=0)
    made, fresh = load_weights(tmp_path / "made"), compose(section, seed=0)
    assert made.config.model_type == student
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in made.state_dict().items())
    num_tokens = (size // patch) ** 2 + extra
    assert read_checkpoint(tmp_path / "made").sequence_format.tokens_per_image == num_tokens
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[made.config.image_token_id] * num_tokens + [5, 6]])
    with torch.no_grad():
        assert made(input_ids=ids, pixel_values=pixels).logits.shape == (1, num_tokens + 2, 300)


@pytest.mark.parametrize(
    ("kind", "options", "fields", "words"),
    [
        ("Dinov2", {"patch_size": 16}, {}, r"makes 17 tokens of an image, but .*tower with select: full has 5"),
        ("Dinov2", {"patch_size": 8}, {"feature_layer": 3}, r"feature_layer is 3, but a 'dinov2' has 2 layers"),
        ("ViT", {"patch_size": 8, "image_size": 64}, {}, r"a 'vit' cannot make features of 32 x 32 pixels alone: "),
        ("Siglip2Vision", {"patch_size": 8}, {}, r"a 'siglip2_vision_model' cannot make features .*spatial_shapes"),
        ("SiglipVision", {"patch_size": 8, "image_size": 64}, {}, r"expects 64 x 64 pixels, but .* 32 x 32"),
        (
            "SiglipVision",
            {"patch_size": 8, "image_size": 32},
            {"select": "default"},
            r"compose\.select is default, which drops the first position, but .* has no known class token",
        ),
        ("ResNet", MAPS, {"feature_layer": -2}, r"compose\.feature_layer is -2, but the features of .* are a map"),
        ("ResNet", MAPS, {"select": "default"}, r"compose\.select is default, but the features of .* are a map"),
        ("Bert", {"vocab_size": 30}, {}, r"is a 'bert', expected a vision tower"),
    ],
)
def test_a_tower_that_does_not_fit_is_refused_before_its_weights_are_read(
    parts: dict[str, str],
    checkpoint: Path,
    tmp_path: Path,
    kind: str,
    options: dict[str, Any],
    fields: dict[str, Any],
    words: str,
) -> None:
    tower = write_tower(kind, tmp_path / "tower", **(options if options is MAPS else {**SMALL, **options}))
    (tmp_path / "tower" / "model.safetensors").write_bytes(b"")
    processor = write_processor(checkpoint, tmp_path / "processor", patch=8, extra=1)
    given = {**parts, "vision": tower, "processor": processor, **fields}
    with pytest.raises(ConfigError, match=rf"^stages\.a: {words}|^stages\.a: compose\..*{words}"):
        check_composition(CompositionSection.model_validate(given), "stages.a")


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


UNREPAIRED = (  # as on a machine whose Python does not repair torchvision by itself
    "sys.meta_path[:] = [each for each in sys.meta_path if not hasattr(each, 'repairs_torchvision')]; "
    "sys.modules.pop('stillhouse_torch_companions', None)"
)


@pytest.mark.parametrize("kind", ["timm", "ResNet"])
def test_a_student_with_a_map_of_features_trains_with_every_loss(
    parts: dict[str, str], checkpoint: Path, tmp_path: Path, make_runner: Callable[..., Runner], kind: str
) -> None:
    prologue = UNREPAIRED
    if kind == "timm":
        timm = pytest.importorskip("timm", reason="the extra `timm`")
        prologue += f"; sys.path.append({str(Path(timm.__file__).parents[1])!r})"
        tower = write_tower("TimmWrapper", tmp_path / "tower", architecture="test_efficientnet")
    else:
        tower = write_tower(kind, tmp_path / "tower", **TOWERS[kind][0])
    processor = write_processor(checkpoint, tmp_path / "processor", patch=32, extra=0, size=128)
    kd = {"response": {}, "visual": {}, "relation": {"weight": 0.5}}
    composed = {"vision": tower, "llm": parts["llm"], "processor": processor}
    prune = {"model": "{run}/composed", "layers": 1, "choose": "least_change", "slice": 4}
    runner = make_runner(
        whole={"init": "{run}/composed", "compose": composed, "losses": kd, "steps": 2},
        pruned={"init": "{run}/pruned", "prune": prune, "losses": kd, "steps": 2},
    )
    for outcome in runner.run_in_turn(("whole", "--evaluate"), ("pruned",), prologue=prologue):
        assert outcome.code == 0, outcome.stderr
    made, whole, pruned = (
        load_weights(runner.folder / "runs" / "t" / name) for name in ("composed", "whole-0", "pruned-0")
    )
    assert made.config.model_type == "fast_vlm"
    frozen = {name for name, tensor in made.model.vision_tower.named_parameters()}
    assert all(
        torch.equal(tensor, whole.model.vision_tower.get_parameter(name))
        for name, tensor in made.model.vision_tower.named_parameters()
    )
    assert frozen == {name for name, _ in pruned.model.vision_tower.named_parameters()}
    assert pruned.config.text_config.num_hidden_layers == 1


def test_a_tower_of_timm_without_timm_says_what_to_install(parts: dict[str, str], tmp_path: Path) -> None:
    """Whether transformers needs timm for the config already, which names no labels, or for the model alone."""
    code = f"""if True:
        import sys; sys.modules["timm"] = None
        from student_train.config import CompositionSection
        from student_train.models.compose import check_composition
        for name in ("bare", "labelled"):
            section = CompositionSection.model_validate({parts!r} | {{"vision": {str(tmp_path)!r} + "/" + name}})
            try: check_composition(section, name)
            except Exception as error: print(type(error).__name__, error)
    """
    config = {"model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 2}
    for name, labels in (("bare", {}), ("labelled", {"label_names": ["a", "b"]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **labels}))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    bare, labelled = done.stdout.splitlines() or [done.stderr, ""]
    for line, name in ((bare, "bare"), (labelled, "labelled")):
        assert line.startswith(f"ConfigError {name}: "), done
        assert line.endswith("is one of timm, which is not installed; install it: pip install 'stillhouse[timm]'")


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
