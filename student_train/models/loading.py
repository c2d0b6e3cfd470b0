"""Loads students: reads a checkpoint's description, checks it against a cache, loads weights, freezes modules.

The parts of a LLaVA are called one by one, so that a frozen tower's features can be kept. Any other vision-language
model, or a text-only decoder, is called as a whole, up to its head, with the inputs of its own processor.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from storage.errors import ConfigError, IdentityError, StillhouseError
from storage.identity import Identity, compute_tokenizer_fingerprint, compute_vocab_size, stored_pixels
from storage.images.settings import (
    PixelSettings,
    describe_settings_differences,
    read_processor_backend,
    read_processor_settings,
)
from student_train.config import Module, Precision
from student_train.data.collate import SequenceFormat
from student_train.data.image_inputs import ImageProcessorAdapter
from student_train.data.sample_images import TensorStore
from student_train.models.huggingface import (
    check_timm,
    find_auto_class,
    find_tower_class,
    get_trunk,
    is_llava,
    load_config,
    load_image_processor,
    load_pixel_settings,
    load_processor,
    load_template_arguments,
    load_tokenizer,
    load_weights,
)
from student_train.models.student import Student
from student_train.models.tower_features import CLASS_TOKENS, measure_tower, read_image_size

FLASH_PACKAGES = ("flash_attn", "flash_attn_interface")  # versions 2 and 3
# Module names of the parts of transformers' vision-language models. A parameter belongs to the first part that matches.
PARTS: dict[Literal["projector", "vision", "llm"], tuple[str, ...]] = {
    "projector": (
        "model.multi_modal_projector", "model.connector", "model.visual.merger", "model.visual.deepstack_merger_list",
        "model.image_newline", "model.embed_vision",
    ),
    "vision": ("model.vision_tower", "model.vision_model", "model.visual"),
    "llm": (
        "model.language_model", "model.text_model", "lm_head",
        "model.embed_tokens", "model.layers", "model.norm",  # of a text-only decoder
    ),
}  # fmt: skip
_LAYERS = ("model.language_model.layers", "model.text_model.layers", "model.layers")
# A module or parameter of a decoder's layer, and whether it belongs to its MLP; `feed_forward` is Llama 4's.
_IN_LAYER = re.compile(rf"(?:{'|'.join(map(re.escape, _LAYERS))})\.\d+(?P<mlp>\.(?:mlp|feed_forward))?(?:\.|$)")
_REFUSED = {
    "paligemma": "tokens before the answer see each other, but a student's batches are causal; take another student",
}
_CHANGED_LOGITS = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
}  # and their neutral values


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A student's description, without weights."""

    folder: str  # or Hub id
    config: Any
    tokenizer: Any
    image_processor: Any  # of a LLaVA, else ImageProcessorAdapter
    sequence_format: SequenceFormat
    pixels: PixelSettings | None = None  # those it was trained with, if it names them
    notes: tuple[str, ...] = ()  # see `check_fit`
    template_arguments: Mapping[str, Any] = field(default_factory=dict)  # of the chat template, as it was trained

    @property
    def is_llava(self) -> bool:
        """Whether the student is a LLaVA, whose parts are called one by one."""
        return is_llava(self.config)


def is_hub_id(name: str | Path) -> bool:
    """Return whether a name that is not a directory may be a Hub id: owner/name."""
    return not Path(name).is_absolute() and len(Path(name).parts) == 2


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read everything but the weights. Errors: StillhouseError; ConfigError for another architecture."""
    if not Path(folder).is_dir() and not is_hub_id(folder):
        raise ConfigError(f"{folder}: is neither a directory nor a Hub id (owner/name); give one of them")
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{folder}: is not a checkpoint (config.json is missing); give a checkpoint's directory")
    config = load_config(folder)
    if find_auto_class(config) is None:
        raise ConfigError(
            f"{folder}: model_type is {config.model_type!r}, expected a vision-language model or causal decoder of "
            "transformers; give a checkpoint of one"
        )
    if config.model_type in _REFUSED:
        raise ConfigError(f"{folder}: a {config.model_type!r} cannot be a student: {_REFUSED[config.model_type]}")
    text = config.get_text_config()
    for name, harmless in _CHANGED_LOGITS.items():
        if getattr(text, name, harmless) not in (None, harmless):
            raise ConfigError(
                f"{folder}: has {name} = {getattr(text, name)}, but the losses use the head's unchanged logits; "
                "take a student without it"
            )
    tokenizer = load_tokenizer(folder)
    image_token_id = getattr(config, "image_token_id", None)
    if is_llava(config):
        image_processor = load_image_processor(folder)
        tokens_per_image = count_visual_tokens(config, image_processor, folder)
    else:
        image_processor, tokens_per_image = _load_processor_adapter(config, folder)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sequence_format = SequenceFormat(
        image_token_id=-1 if image_token_id is None else image_token_id,
        tokens_per_image=tokens_per_image,
        pad_token_id=0 if pad is None else pad,
        max_length=text.max_position_embeddings,
    )
    return Checkpoint(
        str(folder),
        config,
        tokenizer,
        image_processor,
        sequence_format,
        load_pixel_settings(folder),
        template_arguments=load_template_arguments(folder),
    )


def _load_processor_adapter(config: Any, folder: str | Path) -> tuple[ImageProcessorAdapter, int | None]:
    """Load a student's own processor, and the number of visual tokens of each image if it is fixed."""
    is_decoder = not hasattr(config, "vision_config")
    if not is_decoder:
        check_timm(config.vision_config, f"{folder}")
    if not is_decoder and getattr(config, "image_token_id", None) is None:
        raise ConfigError(
            f"{folder}: config.json of a {config.model_type!r} has no image_token_id, which locates images; add it"
        )
    processor = None if is_decoder else load_processor(folder)
    inputs = ImageProcessorAdapter(processor, image_token_id=-1 if is_decoder else config.image_token_id)
    return inputs, 0 if is_decoder else inputs.count_fixed_tokens()


def count_visual_tokens(config: Any, image_processor: Any, folder: str | Path) -> int:
    """Return the number of an image's positions in the decoder: patches and class token, as the config selects."""
    vision = config.vision_config
    pixels = read_image_size(image_processor)
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    if vision.model_type not in CLASS_TOKENS:
        height, width = pixels
        if height is None or width is None:
            raise ConfigError(
                f"{folder}: the image processor does not say what size its pixels have, which the number of visual "
                f"tokens of a {vision.model_type!r} depends on; give preprocessor_config.json a size"
            )
        layer, place = config.vision_feature_layer, f"{folder}: vision tower"
        features = measure_tower(vision, (height, width), layer=layer, place=place)
        if features.kind == "map":
            raise ConfigError(f"{folder}: the vision tower is a {vision.model_type!r}, whose features are no sequence")
        return features.num_positions - dropped
    if pixels != (vision.image_size, vision.image_size):
        raise StillhouseError(
            f"{folder}: the image processor makes {pixels[0]} x {pixels[1]} pixels, but the vision tower expects "
            f"{vision.image_size} x {vision.image_size}; make preprocessor_config.json and config.json agree"
        )
    num_patches = (vision.image_size // vision.patch_size) ** 2
    return num_patches + CLASS_TOKENS[vision.model_type] - dropped


def check_fit(checkpoint: Checkpoint, identity: Identity) -> tuple[str, ...]:
    """Check that a student fits a cache; return a note for each image-processor setting that differs.

    Another size or mean is allowed; visual tokens are then resampled. IdentityError with each field that does not
    fit, both values and what to do.
    """
    vocabulary = checkpoint.tokenizer.get_vocab()
    rows = checkpoint.config.get_text_config().vocab_size
    problems = []
    for name, ours, theirs in (
        ("tokenizer_fingerprint", compute_tokenizer_fingerprint(vocabulary), identity.tokenizer_fingerprint),
        ("vocab_size", compute_vocab_size(vocabulary), identity.vocab_size),
        ("image_token_id", checkpoint.sequence_format.image_token_id, identity.image_token_id),
    ):
        if ours != theirs:
            problems.append(f"{name}: the cache has {theirs}, {checkpoint.folder} has {ours}")
    if rows < identity.vocab_size:
        problems.append(f"vocab_size: the cache has {identity.vocab_size}, the head of {checkpoint.folder} {rows} rows")
    if problems:
        raise IdentityError(
            "this student does not fit this cache; give it the teacher's tokenizer, or dump with a teacher "
            "that has the student's tokenizer:" + "".join(f"\n  {problem}" for problem in problems)
        )
    return _check_pixels(checkpoint, identity)


def _check_pixels(checkpoint: Checkpoint, identity: Identity) -> tuple[str, ...]:
    """Check the pixels that a student sees against the teacher's; see `check_fit`."""
    processor = checkpoint.image_processor
    if isinstance(processor, ImageProcessorAdapter):
        processor = processor.image_processor
    if processor is None or checkpoint.sequence_format.image_token_id < 0:
        return ()
    theirs, backend = stored_pixels(identity), read_processor_backend(processor)
    trained = checkpoint.pixels or theirs.model_copy(update={"backend": backend})
    differing = {name: (cache, own) for name, cache, own in theirs.find_differences(trained)}
    if theirs.backend not in (None, backend):  # the backend in use, whatever it was trained with
        differing["backend"] = (theirs.backend, backend)
    if differing:
        lines = "".join(
            f"\n  pixels.{name}: the cache has {cache}, {checkpoint.folder} has {own}"
            for name, (cache, own) in differing.items()
        )
        raise IdentityError(
            "this student does not see the pixels that this cache's teacher saw; dump again with the student's "
            f"data.background, or start from a student that was not trained on other pixels:{lines}"
        )
    if identity.image_processor is None:
        return ()
    return tuple(describe_settings_differences(identity.image_processor, read_processor_settings(processor)))


def check_trained_parts(checkpoint: Checkpoint, trained: Sequence[Module], *, place: str = "train") -> None:
    """Check that this architecture has each trained part, without reading weights. Errors: ConfigError."""
    model = build_without_weights(checkpoint)
    names = [name for name, _ in model.named_parameters()]
    kind = f"{checkpoint.folder}: a {checkpoint.config.model_type!r}"
    unknown = [name for name in names if find_part(name) is None]
    if unknown:
        raise ConfigError(
            f"{kind} has the parameter {unknown[0]}, which belongs to neither vision, projector nor llm; this "
            "architecture cannot be trained here"
        )
    held = {module for name in names for module in find_modules(name)}
    for part in trained:
        if part not in held:
            raise ConfigError(f"{place}: {kind} has no {part}; it has {', '.join(sorted(held))}; take these")


def build_without_weights(checkpoint: Checkpoint) -> Any:
    """Build the model on torch's meta device: its modules and shapes, and no memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        return find_auto_class(checkpoint.config).from_config(checkpoint.config)


def find_part(name: str) -> Literal["projector", "vision", "llm"] | None:
    """Return the part that a parameter belongs to; None if it is unknown."""
    for part, prefixes in PARTS.items():
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
            return part
    return None


def load_student(checkpoint: Checkpoint, *, precision: Precision, device: torch.device) -> Any:
    """Load the model with its weights onto a device, in eval mode.

    Errors: StillhouseError as `load_weights`; ConfigError for a model whose logits are not its head times its last
    hidden states.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    installed = {package for package in FLASH_PACKAGES if find_spec(package) is not None}
    attention = choose_attention(precision, capability, installed)
    by_part = choose_attention_of_parts(checkpoint.config, attention)
    model: Any = load_weights(checkpoint.folder, dtype=dtype, attn_implementation=by_part)
    model = model.to(device).eval()
    if not checkpoint.is_llava:
        _check_head(model, checkpoint)
    return model


@torch.no_grad()
def _check_head(model: Any, checkpoint: Checkpoint) -> None:
    ids = torch.full((1, 2), checkpoint.sequence_format.pad_token_id, device=model.device)
    head = model.get_output_embeddings()
    logits = model(input_ids=ids, use_cache=False).logits
    ours = None if head is None else head(get_trunk(model)(input_ids=ids, use_cache=False).last_hidden_state)
    if ours is None or ours.shape != logits.shape or not torch.allclose(ours.float(), logits.float(), rtol=1e-2):
        raise ConfigError(
            f"{checkpoint.folder}: the logits of a {checkpoint.config.model_type!r} are not its head times its last "
            "hidden states, as the losses expect; it cannot be trained here"
        )


@torch.no_grad()
def choose_attention(
    precision: Precision, capability: tuple[int, int] | None, installed: Collection[str]
) -> Literal["flash_attention_3", "flash_attention_2", "sdpa", "eager"]:
    """Choose the fastest attention that transformers can use; `capability`: of the GPU, None without one.

    FlashAttention computes in 16 bits: version 3 on Hopper, version 2 from Ampere on. Otherwise PyTorch's SDPA, whose
    CPU kernel takes in 16 bits 5.7 times as long as plain products for 43 tokens, and 0.7 times for 400 (LOG.md).
    """
    if precision == "fp32":
        return "sdpa"
    if capability is None:
        return "eager"
    if capability[0] == 9 and "flash_attn_interface" in installed:
        return "flash_attention_3"
    return "flash_attention_2" if capability >= (8, 0) and "flash_attn" in installed else "sdpa"


def choose_attention_of_parts(config: Any, attention: str) -> str | dict[str, str]:
    """Return an attention for transformers: another one for a model or a tower that lacks it.

    A convolutional tower has no attention at all; gpt-oss, with its attention sinks, has no SDPA. Beside plain products
    a tower takes SDPA, which suits its many tokens.
    """
    attention = _fall_back(find_auto_class(config)._model_mapping[type(config)], attention)
    tower = find_tower_class(getattr(config, "vision_config", None))
    of_tower = attention if tower is None else _fall_back(tower, "sdpa" if attention == "eager" else attention)
    return attention if of_tower == attention else {"": attention, "text_config": attention, "vision_config": of_tower}


def _fall_back(kind: Any, attention: str) -> str:
    """Return the attention if the class of a model supports it, else SDPA or the plain one."""
    flag = {"eager": "", "sdpa": "_supports_sdpa"}.get(attention, "_supports_flash_attn")
    if not flag or getattr(kind, flag, False):
        return attention
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


def load_for_inference(checkpoint: Checkpoint, *, vocab_size: int, features: TensorStore | None = None) -> Student:
    """Load a frozen student, on the GPU in bfloat16 if there is one, else on the CPU in float32."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model = load_student(checkpoint, precision="bf16" if on_gpu else "fp32", device=device)
    model.requires_grad_(False)
    return Student(
        model, vocab_size=vocab_size, image_token_id=checkpoint.sequence_format.image_token_id, features=features
    )


def find_modules(name: str) -> tuple[Module, ...]:
    """Return the modules that contain a parameter, the narrowest first."""
    part = find_part(name)
    assert part is not None, name
    of_layer = _IN_LAYER.match(name)
    if of_layer is None:
        return (part,)
    return ("mlp", "layers", part) if of_layer["mlp"] else ("layers", part)


def freeze(model: nn.Module, trained: Sequence[Module]) -> None:
    """Enable gradients and train mode for the trained parts only. Batch norms keep their statistics."""
    model.requires_grad_(False).eval()
    for part in ("vision", "llm", "projector"):  # a projector may be a submodule of its tower, so it comes last
        for name in PARTS[part]:
            module = _get_submodule(model, name)
            if module is not None:
                module.train(part in trained)
    for name, module in model.named_modules():
        of_layer = _IN_LAYER.match(name)
        if of_layer and ("layers" in trained or (of_layer["mlp"] and "mlp" in trained)):
            module.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # statistics of a batch would depend on ranks, micro-batches and blank images
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(module in trained for module in find_modules(name)))


def _get_submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # not of this architecture, or a parameter
        return None
