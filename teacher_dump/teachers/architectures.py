"""Which architectures vLLM may serve as teachers: tested here, untested here, or refused with a reason.

One table, by `model_type` of config.json. `docs/architectures.md` is made from it and from the list of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from storage.errors import ConfigError

State = Literal["tested", "untested", "refused"]
USE_TRANSFORMERS = "teacher.backend: transformers"


@dataclass(frozen=True)
class EngineSupport:
    """Whether an architecture may be a teacher, and why not."""

    model_type: str
    state: State  # tested: a test compares vLLM with transformers; untested: none does; refused: known to be wrong
    reason: str = ""  # of `untested` and `refused`
    way_round: str = ""  # of `refused`: what to set instead; "" if neither backend can do it


_TESTED = (
    "llama",
    "qwen2",
    "llava",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "idefics3",
    "smolvlm",
    "qwen3",
    "llama4_text",
)
_UNKNOWN = "no test here compares vLLM with transformers for it"
_UNTESTED = {
    "qwen3_vl": "vLLM gave a picture other pixel values than the processor here",
    "qwen3_vl_moe": "vLLM reads norm_topk_prob, which the config that transformers writes lacks",
    "internvl": "vLLM's engine did not start here: its video processor's backend cannot be set",
    "qwen3_5": "vLLM's engine on a CPU computes linear attention in bfloat16 alone",
    "gpt_oss": "vLLM's engine did not start here: it misses 'factor' among the rope parameters",
    "gemma4": "vLLM's engine on a CPU, where these tests run, does not let tokens of an image see each other",
}
# Source: `lm_head(` and the attention masks in transformers, `compute_logits` and the prompt updates in vLLM.
_REFUSED = {
    "chameleon": ("it forbids image tokens in its logits, which the output head alone does not show", ""),
    "mimo": ("vLLM gives its hidden states before the last norm", USE_TRANSFORMERS),
    "step3p5": ("vLLM gives its hidden states before the last norm", USE_TRANSFORMERS),
    "gemma3": (
        "vLLM writes line breaks and separators around an image itself and joins them with the text's, and its CPU "
        "engine does not let tokens of an image see each other",
        USE_TRANSFORMERS,
    ),
    "paligemma": (
        "its question's tokens see each other and its images see the question; vLLM computes them causally, and ends "
        "every prompt with a line break of its own",
        USE_TRANSFORMERS,
    ),
}
_PREFIX_ATTENTION = ("paligemma",)  # tokens of a prompt see later ones, up to the answer
_ROWS_OF_IMAGES = ("visual", "relation")


def engine_support(model_type: str) -> EngineSupport:
    """Returns what is known about an architecture in vLLM; an unknown one is untested."""
    if model_type in _REFUSED:
        return EngineSupport(model_type, "refused", *_REFUSED[model_type])
    if model_type in _TESTED:
        return EngineSupport(model_type, "tested")
    return EngineSupport(model_type, "untested", _UNTESTED.get(model_type, _UNKNOWN))


def list_known_support() -> list[EngineSupport]:
    """Returns the whole table, tested architectures first."""
    return [engine_support(name) for name in (*_TESTED, *_UNTESTED, *_REFUSED)]


def read_engine_support(config: Mapping[str, Any]) -> EngineSupport:
    """Returns the support of a checkpoint, by its config.json.

    A refused decoder refuses the whole model. A LLaVA may have any decoder, and is untested with an untested one.
    """
    text = config.get("text_config")
    decoder = text.get("model_type") if isinstance(text, dict) else None
    if isinstance(decoder, str) and decoder in _REFUSED:
        return engine_support(decoder)
    support = engine_support(str(config.get("model_type", "")))
    if support.state == "tested" and isinstance(decoder, str) and not decoder.endswith("_text"):
        of_decoder = engine_support(decoder)
        if of_decoder.state == "untested":
            return replace(of_decoder, model_type=f"{support.model_type} with a {decoder} decoder")
    return support


def check_backend(config: Mapping[str, Any], backend: Literal["vllm", "transformers"]) -> str | None:
    """Returns a warning for an architecture that is untested in the chosen backend, else None.

    Raises ConfigError for one that is refused there. Every architecture runs in the reference backend, transformers,
    unless the table names no way round.
    """
    support = read_engine_support(config)
    if support.state == "refused" and (backend == "vllm" or not support.way_round):
        advice = f"set {support.way_round}" if support.way_round else "choose another teacher"
        raise ConfigError(
            f"teacher.model: a {support.model_type} cannot be a teacher with teacher.backend: {backend}: "
            f"{support.reason}; {advice}"
        )
    if support.state == "untested" and backend == "vllm":
        return (
            f"teacher: a {support.model_type or 'model without model_type'} is untested in vLLM: {support.reason}; "
            "its dump needs a passed engine check (`stillhouse check --engine`; `run` makes it)"
        )
    return None


def has_prefix_attention(model_type: str) -> bool:
    """Returns whether an image's hidden states depend on the question after it."""
    return model_type in _PREFIX_ATTENTION


def check_families(config: Mapping[str, Any], families: Sequence[str]) -> None:
    """Raises ConfigError for rows that are kept once for an image, of a model whose images see the question."""
    model_type = str(config.get("model_type", ""))
    refused = [family for family in families if family in _ROWS_OF_IMAGES]
    if refused and has_prefix_attention(model_type):
        raise ConfigError(
            f"cache.families names {' and '.join(refused)}, but images of a {model_type} see the question after them, "
            "so their rows differ from question to question and cannot be kept once for an image; "
            "set cache.families: [response]"
        )
