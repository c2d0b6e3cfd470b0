"""The chat templates that foreign models were trained with, as Jinja templates for content with images.

| name | of | an answer ends with |
|---|---|---|
| qwen2_base, phi | TinyLLaVA Factory | <|endoftext|> |
| qwen2_instruct | TinyLLaVA Factory (not ChatML) | <|im_end|> |
| llama, vicuna_v1 | TinyLLaVA Factory, LLaVA-1.5; a beginning-of-sequence token first | </s> |
| gemma | TinyLLaVA Factory | <eos> |
| moe_llava | MoE-LLaVA, LLaVA-MoD with Qwen; images stay where they are in the text | <|endoftext|> |
| chatml | LLaVA with Qwen | <|im_end|> |

The text of all but chatml: a system sentence, then `USER: question ASSISTANT: answer` and the end token for each round,
with nothing between rounds. A generation prompt ends with `ASSISTANT:`, so an answer begins with a space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from storage.errors import ConfigError
from student_train.models.checkpoint_contents import get_shipped_template

IMAGE_TOKEN = "<image>"
_CHATML = (  # a text beside an image is stripped; the image's marker and newline come first
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}"
    "{% for image in images %}<image>\n{% endfor %}{{ text | trim if images else text }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A template, the token that ends an answer, and whether a beginning-of-sequence token comes first."""

    name: str
    jinja: str
    end_token: str
    begin_token: str = ""


def _read_shipped(name: str, paper: Literal["llava_kd", "llava_mod"], end: str, *, begin: str = "") -> ChatTemplate:
    """Return one of the papers' templates, which `compose` uses too. It writes the tokenizer's eos_token: `end`."""
    return ChatTemplate(name, begin + get_shipped_template(paper).read_text(encoding="utf-8"), end, begin)


_ALL = (
    _read_shipped("qwen2_base", "llava_kd", "<|endoftext|>"),
    _read_shipped("qwen2_instruct", "llava_kd", "<|im_end|>"),
    _read_shipped("phi", "llava_kd", "<|endoftext|>"),
    _read_shipped("llama", "llava_kd", "</s>", begin="<s>"),
    _read_shipped("vicuna_v1", "llava_kd", "</s>", begin="<s>"),
    _read_shipped("gemma", "llava_kd", "<eos>"),
    _read_shipped("moe_llava", "llava_mod", "<|endoftext|>"),
    ChatTemplate("chatml", _CHATML, "<|im_end|>"),
)
TEMPLATES = {template.name: template for template in _ALL}


def get_template(name: str) -> ChatTemplate:
    """Return the template of a name. ConfigError listing all names for another one."""
    if name not in TEMPLATES:
        raise ConfigError(f"--template is {name}, expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def choose_by_end_token(names: tuple[str, ...], end_token: str | None) -> ChatTemplate:
    """Return the template, of some, that ends an answer with the tokenizer's end-of-sequence token."""
    for name in names:
        if TEMPLATES[name].end_token == end_token:
            return TEMPLATES[name]
    ends = ", ".join(f"{TEMPLATES[name].end_token} ({name})" for name in names)
    raise ConfigError(
        f"the tokenizer ends a sequence with {end_token}, which no template of this format does: {ends}; say which one "
        "the model was trained with: --template NAME"
    )
