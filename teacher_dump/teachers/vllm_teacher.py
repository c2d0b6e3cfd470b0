"""The vLLM teacher: computes each prompt token's final hidden state, or generates answers.

The only file that imports vllm. vLLM's public pooling API with the task `token_embed` and no activation returns the
hidden states after the last norm (DESIGN §3). The engine runs inside this process. No private attribute of vLLM is
used.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import ConfigError, StillhouseError
from storage.images.settings import BACKEND
from storage.processes import torchvision_shim
from teacher_dump.config import SamplingSection
from teacher_dump.prompts.processor import keep_videos_loadable
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.teachers import hf_checkpoint as checkpoint
from teacher_dump.teachers.device_failure import (
    DeviceLostError,
    PromptRefusedError,
    free_memory,
    is_device_failure,
    is_out_of_memory,
)
from teacher_dump.teachers.teacher import TeacherStates

_log = logging.getLogger(__name__)
_TASK = "token_embed"
_NEEDED = "the dump sets it and depends on its value"
_IN_THE_CHECKPOINT = "change a copy of the checkpoint instead, where the processor and the fingerprint see it"
_RESERVED = {  # settings of the dump: each has its own field, or no other value works
    "model": "set teacher.model",
    "revision": "set teacher.revision",
    "dtype": "set teacher.dtype",
    "max_model_len": "set teacher.max_length",
    "runner": _NEEDED,
    "convert": _NEEDED,
    "pooler_config": _NEEDED,
    "enable_prefix_caching": "the dump shares prefixes wherever vLLM can, and only within a call",
    "tokenizer": _IN_THE_CHECKPOINT,
    "tokenizer_revision": _IN_THE_CHECKPOINT,
    "hf_config_path": _IN_THE_CHECKPOINT,
    "hf_overrides": _IN_THE_CHECKPOINT,
    "mm_processor_kwargs": _IN_THE_CHECKPOINT,
}
_NO_OTHER_MEDIA = {"video": 0, "audio": 0}  # else the engine reserves memory for the longest possible video
_CPU_KV_CACHE_BYTES = 256 * 2**20  # the default takes 92 % of the memory, which the head and others need
_CPU_BLOCK_SIZE = 32  # tokens, the granularity of shared prefixes; many prompts are shorter than the default, 128
_GPU_MEMORY_FRACTION = 0.8  # leaves room for the output head and a chunk of logits beside the engine
_SUPPRESSED = -100.0  # added to a logit: the least that vLLM accepts
_MAX_BIASED = 1024  # ids of one request; vLLM's newer runner accepts no more
_PROBE = {"prompt_token_ids": [0]}  # a request that every engine can answer
T = TypeVar("T")


class VllmTeacher:
    """A model served by vLLM's pooling runner."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        max_length: int,
        settings: Mapping[str, Any],
        served: Path,
        remembered_images: int = 256,
    ) -> None:
        """Starts an engine on a checkpoint folder.

        `max_length` in tokens, visual tokens included; `settings` go to vllm.LLM by name; `served` is a folder for a
        view of a checkpoint whose tensor names vLLM does not know. After `remembered_images` images the engine's
        image cache is reset, since it would keep gigabytes (samples that share an image come together).
        Raises ConfigError for unknown settings.
        """
        self._vllm = _import_vllm()
        from vllm.config import PoolerConfig

        self._engine = _open_engine(
            folder,
            dtype=dtype,
            max_length=max_length,
            settings=settings,
            served=served,
            runner="pooling",
            convert="embed",
            pooler_config=PoolerConfig(task=_TASK),
        )
        self._remembered_images = remembered_images
        self._num_images = 0  # since the image cache was last reset
        self._num_calls = 0
        self.num_shared = 0  # positions so far whose states were taken from a shared prefix

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        """See Teacher. Hidden states are float32, on the CPU.

        A prefix that prompts of one call share, such as an image, is computed once.
        """
        self._num_images += sum(len(prompt.images) for prompt in prompts)
        if self._num_images > self._remembered_images:
            self._engine.reset_mm_cache()
            self._num_images = 0
        self._num_calls += 1
        salts = [f"{self._num_calls}\0{family}" for family in _name_families(prompts)]
        token_ids, computed = self._request_states(prompts, salts, shares=True)
        known = [states for states in computed if states is not None]
        if len(known) == len(prompts):
            hidden = complete_shared_prefixes(token_ids, salts, known)
            self.num_shared += sum(map(len, token_ids)) - sum(map(len, known))
        else:  # other prompts' states may be wrong although their length is right
            _log.warning("vLLM had too little memory for keys and values; computes %d prompts again", len(prompts))
            token_ids, hidden = self._request_states(prompts, salts, shares=False)
        return [
            TeacherStates(ids, self._compute_alone(prompt) if states is None else states)
            for prompt, ids, states in zip(prompts, token_ids, hidden, strict=True)
        ]

    def pixel_values(self, prompt: TeacherPrompt) -> list[Tensor | None]:
        """See ShowsPixels. Runs no model and caches no image."""
        (rendered,) = self._engine.renderer.render_cmpl([make_engine_prompt(prompt)], skip_mm_cache=True)
        shown = [item.get_data().get("pixel_values") for item in rendered["mm_kwargs"].get("image", ())]
        return [values if isinstance(values, Tensor) else None for values in shown]

    def _compute_alone(self, prompt: TeacherPrompt) -> Tensor:
        """Computes all states of a prompt, (t, d), in a call of its own."""
        (ids,), (states,) = self._request_states([prompt], [f"{self._num_calls}"], shares=False)
        if states is None or len(states) != len(ids):
            raise RuntimeError(f"vLLM gives other states than those of the {len(ids)} tokens of a prompt")
        return states

    def _request_states(
        self, prompts: Sequence[TeacherPrompt], salts: Sequence[str], *, shares: bool
    ) -> tuple[list[NDArray[np.int64]], list[Tensor | None]]:
        """Returns token ids, (t,) each, and the computed states: of the last positions, or of all."""
        asked = [
            {**make_engine_prompt(prompt), "cache_salt": salt} for prompt, salt in zip(prompts, salts, strict=True)
        ]
        outputs = call_engine(
            self._engine,
            lambda: self._encode_prompts(asked, shares=shares),
            probe=lambda: self._encode_prompts([_PROBE], shares=False),
        )
        if len(outputs) != len(prompts):
            raise RuntimeError(f"vLLM gives {len(outputs)} answers to {len(prompts)} prompts")
        token_ids = [np.asarray(output.prompt_token_ids, np.int64) for output in outputs]
        return token_ids, [extract_computed_states(output) for output in outputs]

    def _encode_prompts(self, asked: Sequence[Any], *, shares: bool) -> list[Any]:
        return self._engine.encode(
            asked,
            pooling_params=self._vllm.PoolingParams(use_activation=False, skip_reading_prefix_cache=not shares),
            pooling_task=_TASK,
            use_tqdm=False,
        )


def _name_families(prompts: Sequence[TeacherPrompt]) -> list[str]:
    """Returns a name for each prompt; prompts of one name show the same images in the same order."""
    return [
        "\0".join(prompt.image_keys) if len(prompt.image_keys) == len(prompt.images) else f"alone {at}"
        for at, prompt in enumerate(prompts)
    ]


def extract_computed_states(output: Any) -> Tensor | None:
    """Returns the states of a prompt's last positions, (up to t, d) float32, on the CPU: those not in the prefix cache.

    Returns None if their number is wrong: vLLM restarts a preempted prompt, maybe at another position, and appends the
    new states to those computed before. A prompt that read no prefix cache always has too many then.
    """
    states = output.outputs.data
    is_whole = len(states) == len(output.prompt_token_ids) - output.num_cached_tokens
    return states.float().cpu() if is_whole else None


def complete_shared_prefixes(
    token_ids: Sequence[NDArray[np.int64]], families: Sequence[str], computed: Sequence[Tensor]
) -> list[Tensor | None]:
    """Completes states of last positions, (up to t, d), to all states of each prompt, (t, d).

    The first states are those of an earlier prompt of the same family that begins with the same tokens: a state does
    not depend on later tokens. None if there is no such prompt.
    """
    whole: list[Tensor | None] = []
    for at, (ids, states) in enumerate(zip(token_ids, computed, strict=True)):
        num_shared = len(ids) - len(states)
        if num_shared:
            earlier = (
                whole[other]
                for other in range(at)
                if families[other] == families[at] and np.array_equal(token_ids[other][:num_shared], ids[:num_shared])
            )
            found = next((own for own in earlier if own is not None), None)
            whole.append(None if found is None else torch.cat([found[:num_shared], states]))
        else:
            whole.append(states)
    return whole


class VllmGenerator:
    """A model served by vLLM's generating runner."""

    def __init__(self, folder: Path, *, dtype: str, max_length: int, settings: Mapping[str, Any], served: Path) -> None:
        """See VllmTeacher."""
        self._vllm = _import_vllm()
        self._engine = _open_engine(
            folder, dtype=dtype, max_length=max_length, settings=settings, served=served, runner="generate"
        )

    def generate(
        self,
        prompts: Sequence[TeacherPrompt],
        *,
        sampling: SamplingSection,
        seeds: Sequence[int],
        stop_ids: Sequence[int],
        vocab_size: int,
    ) -> list[list[int]]:
        """See Generator."""
        padding = range(vocab_size, self._engine.model_config.get_vocab_size())
        bias = dict.fromkeys(padding, _SUPPRESSED) if 0 < len(padding) <= _MAX_BIASED else None
        parameters = [
            self._vllm.SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(stop_ids),
                ignore_eos=True,  # of the checkpoint, which may not be the teacher's: the stop tokens alone count
                seed=seed,
                detokenize=False,
                logit_bias=bias,
            )
            for seed in seeds
        ]
        asked = [make_engine_prompt(prompt) for prompt in prompts]
        if not asked:
            return []
        short = self._vllm.SamplingParams(max_tokens=1, detokenize=False)
        outputs = call_engine(
            self._engine,
            lambda: self._engine.generate(asked, parameters, use_tqdm=False),
            probe=lambda: self._engine.generate([_PROBE], short, use_tqdm=False),
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


def call_engine(engine: Any, call: Callable[[], T], *, probe: Callable[[], Any]) -> T:
    """Calls a vllm.LLM and returns its answer. A call that fails leaves no request and no cached image behind.

    vLLM caches an image once it has made its tensors, even if the call fails before the engine has received them.
    Then every later prompt with that image would fail, and its request would stay in a list that `encode` waits for.
    `probe` is a small call: it waits for images of the failed call that are still being prepared, and shows that the
    engine still works.

    Raises PromptRefusedError if the prompt is at fault, DeviceLostError if this process can no longer use its
    device, else the call's error.
    """
    first = engine.request_counter.counter
    try:
        return call()
    except Exception as error:  # an engine raises its own kinds
        failure = error
    if is_device_failure(failure):
        raise DeviceLostError(f"vLLM's device or engine failed: {_get_first_line(failure)}") from failure
    if is_out_of_memory(failure):
        failure = failure.with_traceback(None)  # its frames hold the tensors
        free_memory()
    try:
        inner = engine.llm_engine
        inner.abort_request([str(number) for number in range(first, engine.request_counter.counter)])
        probe()
        engine.reset_mm_cache()
        inner.reset_encoder_cache()  # it may list an image whose features were never computed
        engine.reset_prefix_cache()
    except Exception as error:
        raise DeviceLostError(
            f"vLLM does not recover from a failed call: {_get_first_line(failure)}; then: {_get_first_line(error)}"
        ) from failure
    if any(kind.__name__ == "VLLMClientError" for kind in type(failure).__mro__):
        raise PromptRefusedError(_get_first_line(failure)) from failure
    raise failure


def _get_first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _import_vllm() -> Any:
    torchvision_shim.import_torch_companions()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: the actor that called
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm

    return vllm


def _open_engine(
    folder: Path, *, dtype: str, max_length: int, settings: Mapping[str, Any], served: Path, **ours: Any
) -> Any:
    """Starts a vllm.LLM on a checkpoint folder; `ours` are the settings of its runner."""
    vllm = _import_vllm()
    from vllm.platforms import current_platform

    check_settings(settings)
    keep_videos_loadable()
    config = checkpoint.read_json(folder / "config.json")
    if current_platform.is_cpu():
        register_in_process(config.get("architectures", []))
        defaults = {
            "enforce_eager": True,
            "block_size": _CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": max(_CPU_KV_CACHE_BYTES, 2 * max_length * _count_kv_bytes(config)),
        }
    else:
        defaults = {"gpu_memory_utilization": _GPU_MEMORY_FRACTION}
    try:
        return vllm.LLM(
            str(checkpoint.make_servable_view(folder, into=served)),
            dtype=dtype,
            max_model_len=max_length,
            mm_processor_kwargs={"backend": BACKEND},  # the library that the dump's own processor and students use
            **{"limit_mm_per_prompt": _NO_OTHER_MEDIA, **ours, **defaults, **settings},
        )
    except Exception as error:  # an engine raises its own kinds
        raise StillhouseError(f"vLLM cannot serve {folder}: {error}") from error


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a setting that vLLM's engine does not have, or that the dump sets itself."""
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    for name in settings:
        if name in _RESERVED:
            raise ConfigError(f"teacher.settings.{name}: is set by the dump; {_RESERVED[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see vllm's EngineArgs"
            raise ConfigError(f"teacher.settings.{name}: vLLM has no such setting; {hint}")


def make_engine_prompt(prompt: TeacherPrompt) -> Any:
    """Converts a prompt to the form that vllm.LLM accepts."""
    asked: dict[str, Any] = {"prompt_token_ids": prompt.token_ids.tolist()}
    if prompt.images:
        asked["multi_modal_data"] = {"image": list(prompt.images)}
    return asked


def register_in_process(architectures: Sequence[str]) -> None:
    """Makes vLLM inspect the model in this process instead of a new one.

    vLLM uses a new process to keep CUDA out of this one. A CPU does not need that, and the new process has no
    torchvision shim (vLLM imports transformers there before it loads plugins).
    """
    from vllm import ModelRegistry

    for name in architectures:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _count_kv_bytes(config: Mapping[str, Any]) -> int:
    """Returns an upper bound: keys and values of every layer in float32; 0 if the config does not say."""
    settings = checkpoint.get_text_settings(config)
    heads = int(settings.get("num_attention_heads") or 0)
    size = int(settings.get("head_dim") or (int(settings.get("hidden_size") or 0) // max(heads, 1)))
    return 8 * int(settings.get("num_hidden_layers") or 0) * int(settings.get("num_key_value_heads") or heads) * size
