from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from storage.errors import StillhouseError
from storage.processes import torchvision_shim
from storage.records.sample_key import SampleKey
from teacher_dump.data.sample import Sample, SampleRefusedError, Turn
from teacher_dump.prompts.chat_template import (
    AnswerSpan,
    Message,
    RenderedConversation,
    StopToken,
    StopTokens,
    locate_answers,
)
from teacher_dump.prompts.preprocessor import PromptBuilder, make_messages, tokenise
from tests.tiny import CHAT_TEMPLATE, END_OF_TURN, IMAGE_TOKEN, make_tiny_tokenizer

STOP = StopToken(9, "$")
STOPS = StopTokens((STOP,))
VICUNA = (  # as llava-hf/llava-1.5-7b-hf has it: no stop token after an answer
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for item in message['content'] %}{{ '<image>\n' if item['type'] == 'image' else item['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def get_message_text(message: Message) -> str:
    return "".join("#" if item["type"] == "image" else item["text"] for item in message["content"])


def render(messages: list[Message], open_turn: bool) -> str:
    """`[u:question]` and `[a:answer$]` with a line break after the stop token `$`."""
    turns = [
        f"[u:{get_message_text(message)}]" if message["role"] == "user" else f"[a:{get_message_text(message)}$]\n"
        for message in messages
    ]
    return "".join(turns) + ("[a:" if open_turn else "")


def conversation(*texts: str) -> list[Turn]:
    return [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


def builder(template: str | None = CHAT_TEMPLATE, **changes: Any) -> tuple[PromptBuilder, Any]:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    built = PromptBuilder(tokenizer, image_token_id=image_token_id, eos_token_ids=[tokenizer.eos_token_id])
    return built, tokenizer


def sample(*texts: str, num_images: int = 0) -> Sample:
    return Sample(
        SampleKey("x"), "train", "", tuple(f"{number}.png" for number in range(num_images)), tuple(conversation(*texts))
    )


def test_answers_are_located_by_hand_in_two_turns() -> None:
    messages = make_messages(conversation("<image>\nq1", "r1", "q2", "r2"), 1)
    rendered = locate_answers(messages, render, stops=STOPS)
    assert rendered.text == "[u:#q1][a:r1$]\n[u:q2][a:r2$]\n"
    assert rendered.spans == (AnswerSpan(1, 10, STOP), AnswerSpan(3, 24, STOP))


def by_letters(texts: list[str]) -> list[list[int]]:
    return [["abcdef###$".index(letter) for letter in text if letter != "?"] for text in texts]


def test_ids_and_mask_by_hand() -> None:
    rendered = RenderedConversation("abc$def$a", (AnswerSpan(1, 2, STOP), AnswerSpan(3, 5, STOP)))
    prompt = tokenise(rendered, by_letters)
    assert prompt.token_ids.tolist() == [0, 1, 2, 9, 3, 4, 5, 9]
    assert prompt.response_mask.tolist() == [False, False, True, True, False, True, True, True]
    spliced = tokenise(rendered, by_letters, generated={1: [7, 5, 9]}, labels={3})
    assert spliced.token_ids.tolist() == [0, 1, 7, 5, 9, 3, 4, 5, 9]
    assert spliced.response_mask.tolist() == [False] * 6 + [True] * 3


def test_an_answer_without_tokens_is_refused() -> None:
    rendered = RenderedConversation("ab??$", (AnswerSpan(1, 2, STOP),))
    with pytest.raises(SampleRefusedError, match=r"makes no tokens of the answer '\?\?'"):
        tokenise(rendered, by_letters)


def test_a_template_without_stop_token_gets_one() -> None:
    def plain(messages: list[Message], open_turn: bool) -> str:
        return " ".join([get_message_text(message) for message in messages] + ([""] if open_turn else []))

    def rewriting(messages: list[Message], open_turn: bool) -> str:
        return f"{len(messages)} {plain(messages, open_turn)}"

    def speaking(messages: list[Message], open_turn: bool) -> str:
        return plain(messages, open_turn).replace("r", "R")

    messages = make_messages(conversation("q", "r"), 0)
    with pytest.raises(SampleRefusedError, match="for generation where turn 1 starts, and '2 q r' where"):
        locate_answers(messages, rewriting, stops=STOPS)
    with pytest.raises(SampleRefusedError, match="changes the answer of turn 1: it writes 'R' for 'r'"):
        locate_answers(messages, speaking, stops=STOPS)
    built, tokenizer = builder(VICUNA)
    prompt = built.build(sample("<image>\nwhat?", "red", "and?", "blue", num_images=1))
    assert tokenizer.decode(prompt.token_ids) == (
        f"USER: <image>\nwhat? ASSISTANT: red{END_OF_TURN} USER: and? ASSISTANT: blue{END_OF_TURN}"
    )
    answers = tokenizer.decode(prompt.token_ids[prompt.response_mask])
    assert answers == f" red{END_OF_TURN} blue{END_OF_TURN}"


def test_response_mask_covers_the_answers_and_their_stop_tokens_only() -> None:
    built, tokenizer = builder()
    prompt = built.build(sample("<image>\nwhat?", "red", "and the right?", "blue", num_images=1))
    whole = tokenizer.decode(prompt.token_ids)
    assert whole == (
        f"<|im_start|>user\n<image>\nwhat?{END_OF_TURN}\n<|im_start|>assistant\nred{END_OF_TURN}\n"
        f"<|im_start|>user\nand the right?{END_OF_TURN}\n<|im_start|>assistant\nblue{END_OF_TURN}"
    )
    assert tokenizer.decode(prompt.token_ids[prompt.response_mask]) == f"red{END_OF_TURN}blue{END_OF_TURN}"
    before_first = int(np.flatnonzero(prompt.response_mask)[0])
    assert tokenizer.decode(prompt.token_ids[:before_first]).endswith("assistant\n")
    assert prompt.response_mask[-1]
    assert prompt.token_ids.dtype == np.int32


def test_an_answer_that_is_no_label_is_masked_and_its_ids_stay() -> None:
    prompts, _ = builder()
    asked = sample("what?", "red", "sure?", "yes")
    untrained = replace(asked.turns[1], is_trained=False)
    got = prompts.build(replace(asked, turns=(asked.turns[0], untrained, *asked.turns[2:])))
    whole = prompts.build(asked)
    assert got.token_ids.tolist() == whole.token_ids.tolist()
    starts = np.flatnonzero(np.diff(whole.response_mask.astype(int)) == 1) + 1
    assert len(starts) == 2
    assert not got.response_mask[: starts[1]].any()
    assert got.response_mask[starts[1] :].tolist() == whole.response_mask[starts[1] :].tolist()


def test_of_half_of_a_pair_only_the_last_answer_counts() -> None:
    built, tokenizer = builder(VICUNA)
    whole = sample("<image>\nwhat?", "red", "and?", "blue", num_images=1)
    plain, half = built.build(whole), built.build(replace(whole, key=SampleKey("x", "rejected")))
    assert half.token_ids.tolist() == plain.token_ids.tolist()
    assert tokenizer.decode(half.token_ids[half.response_mask]) == f" blue{END_OF_TURN}"
    assert half.response_mask[-1]
    single = sample("what?", "red")
    one, other = built.build(single), built.build(replace(single, key=SampleKey("x", "chosen")))
    assert one.response_mask.tolist() == other.response_mask.tolist()


def test_images_stay_where_their_markers_are_and_one_without_marker_comes_first() -> None:
    built, tokenizer = builder()

    def asked(text: str, num_images: int) -> str:
        decoded = tokenizer.decode(built.build(sample(text, "red", num_images=num_images)).token_ids)
        return decoded.removeprefix("<|im_start|>user\n").split(END_OF_TURN)[0]

    assert asked("what?\n<image>", 1) == "what?<image>\n"
    assert asked("<image>\nor\n<image>\nthis?", 2) == "<image>\nor\n<image>\n\nthis?"
    assert asked("what?", 1) == "<image>\nwhat?"


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (sample("<image> what?", "", num_images=1), "turn 1 is an empty answer"),
        (sample("what?", " \n"), "empty answer"),
        (sample("<image><image> what?", "red", num_images=1), "2 <image> markers for 1 images"),
        (sample("<image> what?", "red"), "1 <image> markers for 0 images"),
        (sample("what?", "<image> red", num_images=1), "outside of a question"),
        (sample("what? <|im_end|>", "red"), "special token"),
        (sample("what?", "<|im_start|>user"), "special token"),
    ],
)
def test_unusable_conversations_are_refused(refused: Sample, message: str) -> None:
    with pytest.raises(SampleRefusedError, match=message.replace("|", r"\|")):
        builder()[0].build(refused)


def test_templates_that_cannot_be_used_are_a_clear_error() -> None:
    with pytest.raises(StillhouseError, match="no chat template"):
        builder(None)
    blind, _ = builder("{% for m in messages %}{% for i in m['content'] %}{{ i['text'] }}{% endfor %}{% endfor %}")
    with pytest.raises(StillhouseError, match="no place for an image"):
        blind.build(sample("what?", "red", num_images=1))
    strings, tokenizer = builder("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}")
    prompt = strings.build(sample("what?", "0"))
    assert tokenizer.decode(prompt.token_ids) == f"what? 0{END_OF_TURN}"


def test_a_teacher_whose_placeholder_is_no_visual_token_is_named_and_can_still_read() -> None:
    torchvision_shim.import_torch_companions()
    from transformers import Gemma3Processor, SiglipImageProcessor

    begin, end = "<start_of_image>", "<end_of_image>"
    tokenizer = make_tiny_tokenizer(("<|endoftext|>", "<|im_start|>", END_OF_TURN, begin, end, IMAGE_TOKEN))
    tokenizer.boi_token, tokenizer.eoi_token = begin, end
    tokenizer.boi_token_id = tokenizer.convert_tokens_to_ids(begin)
    template = CHAT_TEMPLATE.replace(IMAGE_TOKEN, begin)
    processor = Gemma3Processor(SiglipImageProcessor(), tokenizer, chat_template=template, image_seq_length=4)
    del processor.full_image_sequence  # nobody can tell what such a processor writes around an image
    built = PromptBuilder(processor, image_token_id=299, eos_token_ids=[tokenizer.eos_token_id])
    message = "Gemma3Processor marks an image's place by <start_of_image> and the model its visual tokens by <image>"
    with pytest.raises(StillhouseError, match=message):
        built.build(sample("what?", "red", num_images=1))
    prompt = built.build(sample("what?", "red"))
    assert tokenizer.decode(prompt.token_ids[prompt.response_mask]) == f"red{END_OF_TURN}"


def test_a_beginning_of_sequence_token_comes_once() -> None:
    from tokenizers.processors import TemplateProcessing

    _, tokenizer = builder()
    begin = "<|endoftext|>"
    post = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokenizer.convert_tokens_to_ids(begin))])
    tokenizer.backend_tokenizer.post_processor = post
    ids = [tokenizer.eos_token_id]
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    plain = PromptBuilder(tokenizer, image_token_id=image_token_id, eos_token_ids=ids)
    assert tokenizer.decode(plain.build(sample("what?", "red")).token_ids).startswith(begin + "<|im_start|>user")
    tokenizer.chat_template = begin + CHAT_TEMPLATE
    written = PromptBuilder(tokenizer, image_token_id=image_token_id, eos_token_ids=ids)
    assert tokenizer.decode(written.build(sample("what?", "red")).token_ids).count(begin) == 1
