"""Builds prompts: renders a conversation with the teacher's chat template, as token ids and a response mask.

The ids are those of the whole rendered conversation, whatever the tokenizer: no piece of it is tokenised alone. The
ids of each generation prompt (`add_generation_prompt`) must be a prefix of them, which gives the start of an answer's
tokens; they end with its stop token. An answer that the teacher generated keeps its own ids.

Ids are unexpanded: one image token stands for each image. Legend: t tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import ConfigError, StillhouseError
from storage.identity import compute_vocab_size
from storage.records.prompt_ids import find_leading_special_ids, prepend_leading_ids
from teacher_dump.data.sample import IMAGE_MARKER, Sample, SampleRefusedError, Turn
from teacher_dump.prompts.chat_template import (
    ChatTemplate,
    Message,
    RenderedConversation,
    StopTokens,
    TemplateRefusedError,
    locate_answers,
)

TOKENISATION = 2  # the version of how a conversation becomes ids; in a cache's identity, absent there for version 1

# Placeholder texts for an answer whose ids are known, tried in this order: tokenizers join some with the prompt.
_STAND_INS = ("?", "0", "A", "The")

Encode = Callable[[list[str]], list[list[int]]]  # texts to their ids, without special tokens added


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids and where a loss counts."""

    token_ids: NDArray[np.int32]  # (t,)
    response_mask: NDArray[np.bool_]  # (t,) True for answers, their stop token included


class PromptBuilder:
    """Renders and tokenises conversations with a teacher's processor."""

    def __init__(
        self,
        processor: Any,
        *,
        image_token_id: int,
        eos_token_ids: Sequence[int],
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """`processor` is a transformers processor, or a tokenizer for a teacher without images.

        Raises the errors of ChatTemplate; ConfigError if every conversation of this teacher would be refused.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        self._processor = processor
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._image_token: str = tokenizer.convert_ids_to_tokens(image_token_id) if image_token_id >= 0 else ""
        self._stops = StopTokens.from_tokenizer(tokenizer, eos_token_ids, image_token=self._image_token)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = tuple(dict.fromkeys([*special, *(token.text for token in self._stops.known)]))
        self._first_ids = find_leading_special_ids(tokenizer)
        self._vocab_size = compute_vocab_size(tokenizer.get_vocab())
        self._template = ChatTemplate(processor, template_arguments)
        self._takes_items = self._template.supports_items()
        self._takes_images = self._takes_items and self._template.supports_images(self._image_token)
        self._stand_in = self._find_stand_in()

    def build(self, sample: Sample) -> Prompt:
        """Builds ids and mask of a sample; in half of a preference pair only the last answer is a response.

        Raises SampleRefusedError for an empty answer, markers that do not match the images, …
        """
        if sample.images and not self._takes_images:
            raise StillhouseError(self._explain_no_image_place())
        if sample.is_caption:
            return self._add_first_ids(self._build_caption(sample))
        turns = [self._replace_generated(number, turn) for number, turn in enumerate(sample.turns)]
        messages = make_messages(turns, len(sample.images), special_texts=self._special, as_items=self._takes_items)
        rendered = locate_answers(messages, self._template.render, stops=self._stops)
        generated = {number: turn.token_ids for number, turn in enumerate(sample.turns) if turn.token_ids is not None}
        prompt = tokenise(rendered, self._encode, generated=generated, labels=_list_label_turns(sample))
        found = int(np.count_nonzero(prompt.token_ids == self._image_token_id)) if self._image_token else 0
        if found != len(sample.images):
            raise SampleRefusedError(f"the template gave {found} image tokens for {len(sample.images)} images")
        return self._add_first_ids(prompt)

    def _build_caption(self, sample: Sample) -> Prompt:
        """Builds image tokens, the caption and a line break, all of it but the images a label; no stop token.

        Raises SampleRefusedError as `build`; ConfigError for a teacher that frames its image tokens.
        """
        (answer,) = sample.turns
        if self._image_frame:
            raise ConfigError(
                f"data.sources: template: caption writes image tokens alone, but the teacher's chat template frames "
                f"them by {self._image_frame}; use template: chat"
            )
        make_messages([answer], 0, special_texts=self._special)  # refuses empty captions, markers, special tokens
        (ids,) = self._encode([self._image_token * len(sample.images) + answer.text + "\n"])
        num_images = ids.count(self._image_token_id)
        if num_images != len(sample.images) or ids[:num_images] != [self._image_token_id] * num_images:
            raise SampleRefusedError(f"the tokenizer joins the caption with the image token: {ids[: num_images + 1]}")
        return Prompt(np.array(ids, np.int32), np.arange(len(ids)) >= num_images)

    @cached_property
    def _image_frame(self) -> str:
        """The special token that the template writes directly before or after an image; "" for none."""
        items = [{"type": "image"}, {"type": "text", "text": "probe"}]
        before, _, after = self._template.render([{"role": "user", "content": items}], True).partition(
            self._image_token
        )
        framing = (token for token in self._special if before.endswith(token) or after.startswith(token))
        return next(framing, "")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def _replace_generated(self, number: int, turn: Turn) -> Turn:
        """Returns the turn, or a placeholder text for a turn with ids. Raises SampleRefusedError for invalid ids."""
        if turn.token_ids is None:
            return turn
        ids = turn.token_ids
        if not ids or ids[-1] not in (token.id for token in self._stops.known):
            raise SampleRefusedError(f"the token ids of turn {number} do not end with a stop token of the teacher")
        if self._image_token_id in ids:
            raise SampleRefusedError(f"the token ids of turn {number} hold the image token {self._image_token}")
        if not 0 <= min(ids) <= max(ids) < self._vocab_size:
            raise SampleRefusedError(
                f"the token ids of turn {number} reach {max(ids)}; the tokenizer has {self._vocab_size} tokens"
            )
        return Turn(turn.role, self._stand_in)

    def _find_stand_in(self) -> str:
        """Returns a text that this tokenizer does not join with the prompt before it.

        Raises ConfigError if there is none: every conversation would be refused.
        """
        refusal: SampleRefusedError | None = None
        for text in _STAND_INS:
            turns = [Turn("user", "probe"), Turn("assistant", text)]
            messages = make_messages(turns, 0, as_items=self._takes_items)
            try:
                tokenise(locate_answers(messages, self._template.render, stops=self._stops), self._encode)
                return text
            except TemplateRefusedError:
                return _STAND_INS[0]  # the template may accept other conversations
            except SampleRefusedError as error:
                refusal = refusal or error
        raise ConfigError(f"every conversation of this teacher would be refused: {refusal}") from refusal

    def _add_first_ids(self, prompt: Prompt) -> Prompt:
        """Adds the ids that the tokenizer puts first, unless the template wrote them already."""
        ids = prepend_leading_ids(prompt.token_ids.tolist(), self._first_ids)
        num_added = len(ids) - len(prompt.token_ids)
        return Prompt(np.array(ids, np.int32), np.concatenate([np.zeros(num_added, np.bool_), prompt.response_mask]))

    def _explain_no_image_place(self) -> str:
        placeholder = str(getattr(self._processor, "image_token", self._image_token))
        if self._image_token and placeholder != self._image_token:
            return (
                f"{type(self._processor).__name__} marks an image's place by {placeholder} and the model its visual "
                f"tokens by {self._image_token}; of such a teacher only samples without images can be dumped"
            )
        return (
            f"the teacher's chat template has no place for an image: rendering an image item gives no "
            f"{self._image_token or 'image token'}; use a checkpoint with a multimodal template"
        )


def make_messages(
    turns: Sequence[Turn], num_images: int, *, special_texts: Sequence[str] = (), as_items: bool = True
) -> list[Message]:
    """Makes chat-template messages; each `<image>` marker of a question becomes an image item in its place.

    In a conversation with images and no marker, all images precede the first question, as in LLaVA. White space is
    kept, except one line break between a marker that begins or ends a question and its text.
    Raises SampleRefusedError for an empty answer, markers in an answer or of another number than the images, and
    text that contains a special token.
    """
    num_markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if num_markers not in (0, num_images):
        raise SampleRefusedError(f"{num_markers} {IMAGE_MARKER} markers for {num_images} images")
    unplaced = num_images if num_markers == 0 else 0
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        stretches = turn.text.split(IMAGE_MARKER)
        for special in special_texts:
            if any(special in stretch for stretch in stretches):
                raise SampleRefusedError(f"turn {number} spells the special token {special}")
        if turn.role != "user" and len(stretches) > 1:
            raise SampleRefusedError(f"turn {number} has an {IMAGE_MARKER} marker outside of a question")
        if turn.role == "assistant" and not turn.text.strip():
            raise SampleRefusedError(f"turn {number} is an empty answer")
        items: list[Message] = []
        if turn.role == "user":
            items += [{"type": "image"}] * unplaced
            unplaced = 0
        for position, text in enumerate(_strip_line_breaks(stretches)):
            if position:
                items.append({"type": "image"})
            if text or len(stretches) == 1:
                items.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": items if as_items else turn.text})
    return messages


def _list_label_turns(sample: Sample) -> set[int]:
    """Returns the turns whose answers are labels; in half of a preference pair only the last."""
    labels = [number for number, turn in enumerate(sample.turns) if turn.role == "assistant" and turn.is_trained]
    return set(labels if sample.key.half is None else labels[-1:])


def tokenise(
    rendered: RenderedConversation,
    encode: Encode,
    *,
    generated: Mapping[int, Sequence[int]] | None = None,
    labels: Collection[int] | None = None,
) -> Prompt:
    """Tokenises the whole conversation up to its last stop token, and marks its answers.

    `generated` holds ids by turn that replace those of a turn's text, stop token included. `labels`: the turns whose
    answers are labels; None: all of them. Raises SampleRefusedError if the ids of a generation prompt are not a
    prefix of the whole's, or an answer has no tokens.
    """
    whole, *openings = encode([rendered.text, *(rendered.text[: span.start] for span in rendered.spans)])
    ids: list[int] = []
    mask: list[bool] = []
    done = 0  # ids of `whole` that `ids` covers
    for span, opening in zip(rendered.spans, openings, strict=True):
        start = len(opening)
        answer = rendered.text[span.start :].partition(span.stop_token.text)[0]
        if whole[:start] != opening or start < done:
            raise SampleRefusedError(
                f"the tokenizer joins the answer of turn {span.turn}, {answer!r:.60}, with the prompt before it, "
                f"{rendered.text[: span.start][-20:]!r}: generation never sees these tokens"
            )
        if span.stop_token.id not in whole[start:]:
            raise SampleRefusedError(f"the tokenizer does not make one token of {span.stop_token.text!r}")
        stop = whole.index(span.stop_token.id, start)
        if stop == start:
            raise SampleRefusedError(f"the tokenizer makes no tokens of the answer {answer!r:.80}")
        response = list((generated or {}).get(span.turn, whole[start : stop + 1]))
        ids += whole[done:start] + response
        is_label = labels is None or span.turn in labels
        mask += [False] * (start - done) + [is_label] * len(response)
        done = stop + 1
    return Prompt(np.array(ids, np.int32), np.array(mask, np.bool_))


def _strip_line_breaks(stretches: Sequence[str]) -> list[str]:
    """Removes the line break between a leading or trailing marker and its text."""
    texts = list(stretches)
    for position in range(1, len(texts)):  # markers with no text before them
        if any(texts[:position]):
            break
        texts[position] = texts[position].removeprefix("\n")
    for position in range(len(texts) - 2, -1, -1):  # and with none after them
        if any(texts[position + 1 :]):
            break
        texts[position] = texts[position].removesuffix("\n")
    return texts
