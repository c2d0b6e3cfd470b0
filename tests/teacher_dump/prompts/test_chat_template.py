"""Chat templates with stop tokens, arguments, think blocks and dates: handled, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from storage.errors import ConfigError, StillhouseError
from storage.records.sample_key import SampleKey
from teacher_dump.config import TeacherSection
from teacher_dump.data.sample import Sample, SampleRefusedError, Turn
from teacher_dump.prompts.preprocessor import PromptBuilder
from teacher_dump.teachers import fingerprint
from tests.tiny import CHAT_TEMPLATE, END_OF_TURN, make_tiny_tokenizer

END_OF_TEXT = "<|endoftext|>"
BODY, OPENING = CHAT_TEMPLATE.split("{%- if add_generation_prompt %}")
# Qwen3's: the last answer gets an empty think block, and so does the generation prompt if thinking is off.
THINKING = (
    "{%- for message in messages -%}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'][0]['text'] }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def build(template: str, *texts: str, eos: tuple[str, ...] = (END_OF_TURN,), **arguments: Any) -> tuple[str, str]:
    """Returns the text of a conversation's tokens, and of its answers."""
    tokenizer = make_tiny_tokenizer(template=template)
    tokenizer.eos_token = eos[0]
    builder = PromptBuilder(
        tokenizer,
        image_token_id=-1,
        eos_token_ids=tokenizer.convert_tokens_to_ids(list(eos)),
        template_arguments=arguments,
    )
    turns = tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))
    prompt = builder.build(Sample(SampleKey("x"), "train", "", (), turns))
    return tokenizer.decode(prompt.token_ids), tokenizer.decode(prompt.token_ids[prompt.response_mask])


def facts_of(tmp_path: Path, template: str, eos_token: str) -> fingerprint.ProcessorFacts:
    tokenizer = make_tiny_tokenizer(template=template)
    tokenizer.eos_token = eos_token
    return fingerprint.read_processor_facts(tmp_path, tokenizer)


@pytest.mark.parametrize("eos", [(END_OF_TEXT,), (END_OF_TEXT, END_OF_TURN), (END_OF_TURN,)])
def test_the_stop_token_is_what_the_template_writes(eos: tuple[str, ...]) -> None:
    whole, answers = build(CHAT_TEMPLATE, "what?", "red", "or?", "blue", eos=eos)
    assert answers == f"red{END_OF_TURN}blue{END_OF_TURN}"
    assert END_OF_TEXT not in whole


def test_the_identity_stops_at_what_the_template_writes(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    text, turn = tokenizer.convert_tokens_to_ids([END_OF_TEXT, END_OF_TURN])
    assert facts_of(tmp_path, CHAT_TEMPLATE, END_OF_TEXT).eos_token_ids == (text, turn)
    assert facts_of(tmp_path, CHAT_TEMPLATE, END_OF_TURN).eos_token_ids == (turn,)
    silent = CHAT_TEMPLATE.replace("<|im_end|>\n", "\n")
    assert facts_of(tmp_path, silent, END_OF_TEXT).eos_token_ids == (text,)


def test_a_stop_token_that_ends_a_whole_conversation_is_not_an_answers(tmp_path: Path) -> None:
    template = f"{CHAT_TEMPLATE}{{%- if not add_generation_prompt %}}{END_OF_TEXT}{{% endif %}}"  # as Phi-3's
    assert build(template, "what?", "red", eos=(END_OF_TEXT,))[1] == f"red{END_OF_TURN}"
    between = CHAT_TEMPLATE.replace("<|im_end|>\n", "\n").replace(
        "<|im_start|>{{", "{% if message['role'] == 'user' and not loop.first %}<|im_end|>{% endif %}<|im_start|>{{"
    )  # writes it with the next question
    whole, answers = build(between, "what?", "red", "or?", "blue")
    assert answers == f"red{END_OF_TURN}blue{END_OF_TURN}"
    assert whole.count(END_OF_TURN) == 2


@pytest.mark.parametrize("written", ["###", "<image>", "<|im_ends|>"])
def test_a_stop_token_that_cannot_be_told_is_refused_with_both_named(written: str) -> None:
    template = CHAT_TEMPLATE.replace("<|im_end|>\n", f"{written}\n")
    tokenizer = make_tiny_tokenizer(template=template)
    with pytest.raises(ConfigError, match=rf"writes '{written}.*' after the answer of turn 1, .* by '<\|endoftext\|>'"):
        PromptBuilder(tokenizer, image_token_id=299, eos_token_ids=[tokenizer.pad_token_id])


def test_arguments_reach_the_template_and_unread_ones_are_refused() -> None:
    assert build(THINKING, "what?", "red", enable_thinking=False) == (
        f"<|im_start|>user\nwhat?{END_OF_TURN}\n<|im_start|>assistant\n<think>\n\n</think>\n\nred{END_OF_TURN}",
        f"red{END_OF_TURN}",
    )
    with pytest.raises(ConfigError, match=r"chat_template_arguments\.enable_thinkin: .* does not read enable_thinkin;"):
        build(THINKING, "what?", "red", enable_thinkin=False)


def test_reserved_arguments_are_refused_by_the_config() -> None:
    assert TeacherSection(model="m", chat_template_arguments={"enable_thinking": False}).chat_template_arguments
    for name, value in (("tokenize", True), ("messages", []), ("day", {1, 2})):
        with pytest.raises(ValidationError, match=r"set by the dump itself|expected text, numbers"):
            TeacherSection(model="m", chat_template_arguments={name: value})


def test_think_blocks_are_refused_with_what_really_happened() -> None:
    with pytest.raises(
        ConfigError, match=r"every conversation .* writes '<think>.*' before the answer of turn 1, which"
    ):
        build(THINKING, "what?", "red")
    with pytest.raises(SampleRefusedError, match=r"rewrites turn 1 once later turns follow: .* in place of '<think>"):
        build(THINKING, "what?", "red", "or?", "blue", enable_thinking=False)
    opening = f"{BODY}{{%- if add_generation_prompt %}}<|im_start|>assistant\n<think>\n{{% endif %}}"  # DeepSeek-R1's
    with pytest.raises(ConfigError, match=r"writes '<think>\\n' for generation where turn 1 starts, and '\?<"):
        build(opening, "what?", "red")
    dropping = CHAT_TEMPLATE.replace("{{ item['text'] }}", "{{ item['text'].split('</think>')[-1] }}")
    assert build(dropping, "what?", "red")[1] == f"red{END_OF_TURN}"
    with pytest.raises(SampleRefusedError, match=r"changes the answer of turn 1: it writes 'red.* for '<think>no</thi"):
        build(dropping, "what?", "<think>no</think>red")


def test_a_template_that_rewrites_an_earlier_turn_is_refused() -> None:
    numbered = CHAT_TEMPLATE.replace("{{ item['text'] }}", "{{ item['text'] if loop.last else '' }}").replace(
        "<|im_end|>\n{% endfor", "{{ '' if messages | length < 3 else '!' }}<|im_end|>\n{% endfor"
    )
    with pytest.raises(
        SampleRefusedError, match=r"for generation where turn 1 starts|rewrites turn 1 once later turns"
    ):
        build(numbered, "what?", "red", "or?", "blue")


def test_a_date_in_the_template_must_be_fixed() -> None:
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    template = f"{dated}<|im_start|>system\nToday: {{{{ date_string }}}}<|im_end|>\n{CHAT_TEMPLATE}"
    with pytest.raises(ConfigError, match="writes today's date"):
        build(template, "what?", "red")
    assert "Today: 26 Jul 2024" in build(template, "what?", "red", date_string="26 Jul 2024")[0]


def test_a_teacher_that_always_joins_answers_with_the_prompt_is_refused() -> None:
    from tests.tokenizer_families import make_tokenizer

    greedy = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'][0]['text'] + '\n' }}"
        "{% else %}{{ '\n' + message['content'][0]['text'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer("byte_bpe", template=greedy)
    with pytest.raises(
        StillhouseError, match="every conversation of this teacher would be refused: the tokenizer joins"
    ):
        PromptBuilder(tokenizer, image_token_id=-1, eos_token_ids=[tokenizer.eos_token_id])


def test_white_space_around_markers_stays_but_for_one_line_break() -> None:
    from teacher_dump.prompts.preprocessor import make_messages

    def shown(text: str) -> str:
        content = make_messages([Turn("user", text)], text.count("<image>"))[0]["content"]
        return "".join("#" if item["type"] == "image" else item["text"] for item in content)

    expected = {
        "Is <image> red": "Is # red",
        "<image>\nwhat?": "#what?",
        "<image>\n\n what? ": "#\n what? ",
        "<image> what?": "# what?",
        " <image>\nwhat?": " #\nwhat?",
        "what?\n<image>": "what?#",
        "what? \n\n<image>": "what? \n#",
        "<image>\n<image>\nwhich?": "##which?",
        "which?\n<image>\n<image>": "which?##",
        "<image>\na\n<image>\nb\n<image>": "#a\n#\nb#",
        "<image>\n": "#",
        "plain \n": "plain \n",
    }
    assert {text: shown(text) for text in expected} == expected
