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

from storage.errors import ConfigError

IMAGE_TOKEN = "<image>"
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_TEXT_OF = (  # a message's text, stripped; an image's marker and newline lie apart from it
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') %}"
    "{{ texts | join('\n') | trim }}{% endif %}"
)
_IMAGES_FIRST = (
    "{% if message['content'] is not string %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>\n{% endif %}{% endfor %}{% endif %}" + _TEXT_OF
)
_IN_PLACE = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>\n{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A template, the token that ends an answer, and whether a beginning-of-sequence token comes first."""

    name: str
    jinja: str
    end_token: str
    begin_token: str = ""


def _make_rounds(name: str, end: str, *, begin: str = "", images: str = _IMAGES_FIRST) -> ChatTemplate:
    jinja = (
        f"{begin}{{% if messages[0]['role'] == 'system' %}}{{% set message = messages[0] %}}{_TEXT_OF} {{% else %}}"
        f"{_SYSTEM} {{% endif %}}"
        "{% for message in messages %}"
        f"{{% if message['role'] == 'user' %}}USER: {images} "
        f"{{% elif message['role'] == 'assistant' %}}ASSISTANT: {_TEXT_OF}{end}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    return ChatTemplate(name, jinja, end, begin)


_CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    f"{{% if message['role'] == 'user' %}}{_IMAGES_FIRST}{{% else %}}{_TEXT_OF}{{% endif %}}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ALL = (
    _make_rounds("qwen2_base", "<|endoftext|>"),
    _make_rounds("qwen2_instruct", "<|im_end|>"),
    _make_rounds("phi", "<|endoftext|>"),
    _make_rounds("llama", "</s>", begin="<s>"),
    _make_rounds("vicuna_v1", "</s>", begin="<s>"),
    _make_rounds("gemma", "<eos>"),
    _make_rounds("moe_llava", "<|endoftext|>", images=_IN_PLACE),
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
