"""Greedy generation in batches, with the same sequence format and vocabulary as in training.

Legend: b sequences, t tokens, v real vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from student_train.data.collate import PromptBatch
from student_train.data.image_inputs import ModelInputs
from student_train.models.student import Student


@torch.inference_mode()
def generate_greedily(
    student: Student, prompts: PromptBatch, *, max_new_tokens: int, eos_token_ids: Collection[int]
) -> list[list[int]]:
    """Generate the most probable continuation of each prompt, token by token, without its end-of-turn token.

    Stops at a token of `eos_token_ids` or after `max_new_tokens`. Ids lie in the real vocabulary.
    """
    if prompts.vision.inputs is not None:
        return _generate_with_transformers(student, prompts, prompts.vision.inputs, max_new_tokens, list(eos_token_ids))
    decoder = student.model.model.language_model
    embedded = student.embed_inputs(prompts.input_ids, prompts.visual_positions, prompts.vision)
    mask = prompts.attention_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in range(len(mask))]
    open_rows = list(range(len(mask)))
    past = None
    for _ in range(max_new_tokens):
        output = decoder(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
        )
        past = output.past_key_values
        chosen = student.compute_logits(output.last_hidden_state[:, -1]).argmax(1)  # (b,)
        ids = chosen.tolist()
        open_rows = [row for row in open_rows if ids[row] not in eos_token_ids]
        for row in open_rows:
            answers[row].append(ids[row])
        if not open_rows:
            break
        embedded = student.model.get_input_embeddings()(chosen)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def _generate_with_transformers(
    student: Student, prompts: PromptBatch, inputs: ModelInputs, max_new_tokens: int, eos_token_ids: list[int]
) -> list[list[int]]:
    """Generate with the model's own `generate`, for models that place their images themselves."""
    from transformers import GenerationConfig

    start = prompts.input_ids.shape[1]
    num_rows = student.head.weight.shape[0]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_token_ids or None,
        pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
        suppress_tokens=list(range(student.vocab_size, num_rows)) or None,
    )
    shown = inputs.tensors if inputs.ids else {}
    output = student.model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        generation_config=config,
        **student.make_arguments(prompts.input_ids, inputs, shown),
    )
    answers = output[:, start:].tolist()
    return [_cut_at_stop(answer, eos_token_ids) for answer in answers]


def _cut_at_stop(ids: list[int], stops: list[int]) -> list[int]:
    return ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids))]
