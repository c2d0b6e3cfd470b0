"""Prompts through a tokenizer of every family: ids, spans, stop tokens and white space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.records.sample_key import SampleKey
from teacher_dump.data.sample import Sample, SampleRefusedError, Turn
from teacher_dump.prompts.preprocessor import PromptBuilder
from teacher_dump.prompts.truncation import compute_kept_length
from tests.tiny import CHAT_TEMPLATE, END_OF_TURN, IMAGE_TOKEN
from tests.tokenizer_families import FAMILIES, make_tokenizer

SPACED = (  # Vicuna's: white space around answers, and a stop token that the tokenizer ends a sequence by
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% for item in message['content'] %}"
    "{{ '<image>\n' if item['type'] == 'image' else item['text'] }}{% endfor %} "
    "{% else %}ASSISTANT: {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SILENT = SPACED.replace("</s>", " ")  # writes nothing after an answer
TEMPLATES = {"chatml": (CHAT_TEMPLATE, END_OF_TURN), "spaced": (SPACED, "</s>"), "silent": (SILENT, "</s>")}


@pytest.fixture(scope="session")
def tokenizers() -> dict[tuple[str, str], Any]:
    """By family and template."""
    return {
        (family, name): make_tokenizer(family, template=template, eos_token=eos)
        for family in FAMILIES
        for name, (template, eos) in TEMPLATES.items()
    }


def build(tokenizer: Any, *texts: str, num_images: int = 0, **arguments: Any) -> Any:
    builder = PromptBuilder(
        tokenizer,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        eos_token_ids=[tokenizer.eos_token_id],
        template_arguments=arguments,
    )
    turns = tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))
    images = tuple(f"{number}.png" for number in range(num_images))
    return builder.build(Sample(SampleKey("x"), "train", "", images, turns))


def draw_tokens(tokenizer: Any, prompt: Any) -> list[str]:
    """Returns its tokens, with answers in braces."""
    tokens = tokenizer.convert_ids_to_tokens(prompt.token_ids.tolist())
    return [
        f"{{{token}}}" if masked else token for token, masked in zip(tokens, prompt.response_mask.tolist(), strict=True)
    ]


USER, ASSISTANT = [*"user"], [*"assistant"]
BY_HAND = {  # of "what?", "red", "or", "a red"
    "byte_bpe": [
        "<|im_start|>", *USER, "Ċ", *"what?", "<|im_end|>", "Ċ", "<|im_start|>", *ASSISTANT, "Ċ", "{re}", "{d}",
        "{<|im_end|>}", "Ċ", "<|im_start|>", *USER, "Ċ", *"or", "<|im_end|>", "Ċ", "<|im_start|>", *ASSISTANT, "Ċ",
        "{a}", "{Ġred}", "{<|im_end|>}",
    ],
    "sentencepiece_legacy": [
        "<|im_start|>", "▁", *USER, "\n", *"what?", "<|im_end|>", "▁", "\n", "<|im_start|>", "▁", *ASSISTANT, "\n",
        "{re}", "{d}", "{<|im_end|>}", "▁", "\n", "<|im_start|>", "▁", *USER, "\n", *"or", "<|im_end|>", "▁", "\n",
        "<|im_start|>", "▁", *ASSISTANT, "\n", "{a}", "{▁red}", "{<|im_end|>}",
    ],
    "sentencepiece": [
        "<|im_start|>", *USER, "\n", *"what?", "<|im_end|>", "\n", "<|im_start|>", *ASSISTANT, "\n", "{re}", "{d}",
        "{<|im_end|>}", "\n", "<|im_start|>", *USER, "\n", *"or", "<|im_end|>", "\n", "<|im_start|>", *ASSISTANT, "\n",
        "{a}", "{▁red}", "{<|im_end|>}",
    ],
    "unigram": [
        "<|im_start|>", "▁", *USER, "\n", *"what?", "<|im_end|>", "▁", "\n", "<|im_start|>", "▁", *ASSISTANT, "\n",
        "{red}", "{<|im_end|>}", "▁", "\n", "<|im_start|>", "▁", *USER, "\n", *"or", "<|im_end|>", "▁", "\n",
        "<|im_start|>", "▁", *ASSISTANT, "\n", "{a}", "{▁red}", "{<|im_end|>}",
    ],
    "wordpiece": [
        "[CLS]", "<|im_start|>", "user", "w", "##h", "##a", "##t", "?", "<|im_end|>", "<|im_start|>", "assistant",
        "{red}", "{<|im_end|>}", "<|im_start|>", "user", "o", "##r", "<|im_end|>", "<|im_start|>", "assistant", "{a}",
        "{red}", "{<|im_end|>}",
    ],
    "python": [
        "<|im_start|>", *USER, "\n", *"what?", "<|im_end|>", "\n", "<|im_start|>", *ASSISTANT, "\n", "{r}", "{e}",
        "{d}", "{<|im_end|>}", "\n", "<|im_start|>", *USER, "\n", *"or", "<|im_end|>", "\n", "<|im_start|>",
        *ASSISTANT, "\n", "{a}", "{ }", "{r}", "{e}", "{d}", "{<|im_end|>}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_answers_by_hand(family: str, tokenizers: dict[tuple[str, str], Any]) -> None:
    tokenizer = tokenizers[family, "chatml"]
    assert draw_tokens(tokenizer, build(tokenizer, "what?", "red", "or", "a red")) == BY_HAND[family]


texts = st.text(alphabet="re d?\nA0", min_size=1, max_size=7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_ids_are_those_of_the_whole_and_generation_sees_a_prefix(
    family: str, name: str, tokenizers: dict[tuple[str, str], Any], turns: list[tuple[str, str]]
) -> None:
    tokenizer = tokenizers[family, name]
    flat = [text for turn in turns for text in turn]
    prompt: Any = None
    try:
        prompt = build(tokenizer, *flat)
    except SampleRefusedError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert any(reason in refusal for reason in ("empty answer", "joins the answer", "makes no tokens"))
        return
    messages = [
        {"role": "assistant" if number % 2 else "user", "content": [{"type": "text", "text": text}]}
        for number, text in enumerate(flat)
    ]

    def rendered(count: int, open_turn: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=open_turn)

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, mask = prompt.token_ids.tolist(), prompt.response_mask
    first = [tokenizer.convert_tokens_to_ids("[CLS]")] if family == "wordpiece" else []
    assert ids[: len(first)] == first
    if name != "silent":  # where tokens of the template's text and stop tokens of ours are not the same text
        whole = encoded(rendered(len(messages), False))
        assert ids[len(first) :] == whole[: len(ids) - len(first)]
    starts = np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1)
    ends = np.flatnonzero(np.diff(mask.astype(int), append=0) == -1) + 1
    assert len(starts) == len(ends) == len(turns)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if name != "silent" or number == 0:
            assert ids[len(first) : start] == encoded(rendered(2 * number + 1, True))
        assert ids[end - 1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[start : end - 1]
        shorter = build(tokenizer, *flat[: 2 * number + 2])
        assert shorter.token_ids.tolist() == ids[:end]
    if len(turns) > 1:  # cutting follows the same ids
        kept = compute_kept_length(mask, np.arange(len(ids)), max_length=len(ids) - 1, rule="cut_turns")
        assert ids[:kept] == build(tokenizer, *flat[:-2]).token_ids.tolist()


def test_an_answer_that_the_tokenizer_joins_with_the_prompt_is_refused_by_name(
    tokenizers: dict[tuple[str, str], Any],
) -> None:
    tokenizer = tokenizers["byte_bpe", "chatml"]
    with pytest.raises(SampleRefusedError, match=r"joins the answer of turn 3, '\\nred', .*generation never sees"):
        build(tokenizer, "what?", "red", "or", "\nred")
    assert draw_tokens(tokenizer, build(tokenizer, "\n", "red\n"))[-4:] == ["{re}", "{d}", "{Ċ}", "{<|im_end|>}"]
