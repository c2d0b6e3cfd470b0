"""Parts of the tiny random checkpoints: sizes, token names, and how a checkpoint is drawn and saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB_SIZE = 300  # of every tokenizer here
PADDED_VOCAB = 320  # rows of the head
TEXT: dict[str, Any] = {
    "vocab_size": PADDED_VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # of 32, what vLLM's CPU attention takes
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
}
SIGLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_ATTENTION_OUTPUTS = ("self_attn.o_proj.weight", "linear_attn.out_proj.weight")


def name_ends(tokenizer: Any) -> dict[str, Any]:
    """Returns the config's fields for the tokens that end and pad a sequence."""
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def save_random(
    folder: Path, build: Callable[[], Any], processor: Any, *, louder: float = 1.0, embedding: float = 0.3
) -> Path:
    """Saves a checkpoint with random weights that let every part be seen in the output, and its processor.

    `louder` multiplies the decoder's attention outputs and the head: swapping an image must change an answer by 0.1
    nats or more. `embedding` is the standard deviation of embeddings: a tied head must not repeat its input.
    """
    import torch

    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.05)
            elif parameter.dim() == 1 and "newline" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)  # norms: a missing or wrong one shows
            elif ".experts." in name:  # (e, …, in)
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif parameter.dim() >= 2 and "embed" not in name.rsplit(".", 2)[-2]:
                parameter.normal_(0, (parameter.numel() / len(parameter)) ** -0.5)
            else:
                parameter.normal_(0, embedding)
            if name == "lm_head.weight" or ("language_model" in name and name.endswith(_ATTENTION_OUTPUTS)):
                parameter.mul_(louder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
