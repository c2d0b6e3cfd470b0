"""The slow reference teacher: transformers, one prompt at a time, no padding and no batching."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.errors import ConfigError, StillhouseError
from storage.images.pixels import Picture
from storage.images.placeholders import get_placeholder
from storage.processes import torchvision_shim
from teacher_dump.config import SamplingSection
from teacher_dump.prompts.image_tokens import Expansion, VisualGrid, expand_image_tokens
from teacher_dump.prompts.processor import load_processor
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.teachers.architectures import has_prefix_attention
from teacher_dump.teachers.device_failure import PromptRefusedError
from teacher_dump.teachers.teacher import TeacherStates

_NO_INPUTS = ("input_ids", "attention_mask", "labels")  # of the processor's text
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # 1 where an image is


class TransformersTeacher:
    """A causal vision-language model of transformers, up to its last norm."""

    def __init__(
        self, folder: Path, *, dtype: str, image_token_id: int, settings: dict[str, object], spreads: bool = False
    ) -> None:
        """Loads the model, on the first GPU if there is one.

        `spreads`: on all GPUs that this process sees, one after another, if there are several and accelerate, by which
        transformers does it, is installed.
        Raises ConfigError for any setting but trust_remote_code.
        """
        unknown = sorted(set(settings) - {"trust_remote_code"})
        if unknown:
            raise ConfigError(f"teacher.settings: the transformers backend takes no {', '.join(unknown)}")
        torchvision_shim.import_torch_companions()
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        trust = bool(settings.get("trust_remote_code", False))
        kind = AutoModelForCausalLM if image_token_id < 0 else AutoModelForImageTextToText
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        spreads = spreads and torch.cuda.device_count() > 1 and find_spec("accelerate") is not None
        try:
            model: Any = kind.from_pretrained(
                folder,
                dtype=self._dtype,
                trust_remote_code=trust,
                use_safetensors=True,
                **({"device_map": "auto"} if spreads else {}),
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise StillhouseError(f"transformers cannot load {folder}: {error}") from error
        self._model = model.eval() if spreads else model.to(self._device).eval()
        trunk = model.base_model
        self._trunk = model.model if trunk is model else trunk  # Llama 4's decoder names it by another prefix
        self._processor = load_processor(folder, trust_remote_code=trust)
        self._grid = VisualGrid(self._processor, image_token_id)
        self._image_token_id = image_token_id

    @torch.no_grad()
    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        """See Teacher."""
        return [self._compute_states(prompt) for prompt in prompts]

    @torch.no_grad()
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
        from transformers import GenerationConfig

        drawn: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            suppress_tokens=list(range(vocab_size, self._model.get_output_embeddings().weight.shape[0])) or None,
            **drawn,
        )
        answers = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            inputs = self._make_inputs(prompt)
            torch.manual_seed(seed)
            ids = self._model.generate(**inputs, generation_config=config)[0]
            answers.append(ids[inputs["input_ids"].shape[1] :].tolist())
        return answers

    def _compute_states(self, prompt: TeacherPrompt) -> TeacherStates:
        inputs = self._make_inputs(prompt)
        ids = inputs["input_ids"]
        hidden = self._trunk(**inputs, use_cache=False).last_hidden_state[0]
        if hidden.shape[0] != ids.shape[1]:
            raise StillhouseError(f"transformers gave {hidden.shape[0]} positions for {ids.shape[1]} tokens")
        return TeacherStates(ids[0].cpu().numpy(), hidden.float().cpu())

    def _make_inputs(self, prompt: TeacherPrompt) -> dict[str, Tensor]:
        """Makes the model's inputs: a batch of one, images expanded, on its device."""
        images = [self._grid.ids(image) for image in prompt.images]
        expansion = expand_image_tokens(prompt.token_ids, images, self._image_token_id)
        ids = torch.from_numpy(expansion.token_ids)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.images:
            inputs |= self._make_image_inputs(prompt.images, ids == self._image_token_id)
        if has_prefix_attention(self._model.config.model_type):
            inputs["token_type_ids"] = (torch.arange(ids.shape[1]) >= _count_prefix(prompt, expansion)).long()[None]
        return {
            name: value.to(self._device, self._dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _make_image_inputs(self, images: Sequence[Picture], is_visual: Tensor) -> dict[str, Tensor]:
        """Returns the processor's outputs for images, with token types if the model needs them."""
        token = self._processor.tokenizer.convert_ids_to_tokens(self._image_token_id)
        token = get_placeholder(self._processor, token)
        inputs = dict(self._processor(images=list(images), text=[token * len(images)], return_tensors="pt"))
        for name in _NO_INPUTS:
            inputs.pop(name, None)
        return {name: is_visual.long() if name in _TOKEN_TYPES else value for name, value in inputs.items()}


def _count_prefix(prompt: TeacherPrompt, expansion: Expansion) -> int:
    """Returns the number of positions before the answer, which see each other; without an answer all of them.

    Raises PromptRefusedError for several answers: later questions would be seen causally, unlike in generation.
    """
    mask = prompt.response_mask
    starts = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0) == 1) if mask is not None else []
    if len(starts) > 1:
        raise PromptRefusedError(f"it has {len(starts)} answers, and this model answers one question of a prompt")
    return int(expansion.positions[starts[0]]) if len(starts) else len(expansion.token_ids)
