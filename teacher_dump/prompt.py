"""Prompts: a conversation through the teacher's own chat template, as token ids and a response mask.

The text is cut where a model starts and stops speaking, and each piece is tokenised by itself, so the
prompt's last token and the response's first are the ones that generation would have seen.

Ids are unexpanded: one image token stands for each image. Legend: t tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import StillhouseError
from storage.preference import CHOSEN, REJECTED
from teacher_dump.samples import Sample, SampleRefusedError, Turn

IMAGE_MARKER = "<image>"  # LLaVA's, in the conversation's text

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]  # messages, whether to open the assistant's turn


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered conversation that is tokenised by itself."""

    text: str
    is_response: bool
    stop_id: int | None = None  # an end of turn that the template leaves out, appended to the ids


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids and where a loss counts."""

    token_ids: NDArray[np.int32]  # (t,)
    response_mask: NDArray[np.bool_]  # (t,) True for answers, their stop token included


@dataclass(frozen=True)
class StopTokens:
    """The tokens that end an assistant's turn, the tokenizer's own first."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]

    def cut(self, text: str) -> int | None:
        """Where the first stop token in `text` ends, or None."""
        ends = [(text.index(stop), len(stop)) for stop in self.texts if stop in text]
        return sum(min(ends)) if ends else None


class PromptBuilder:
    """Renders and tokenises conversations with a teacher's processor."""

    def __init__(self, processor: Any, *, image_token_id: int, eos_token_ids: Sequence[int]) -> None:
        """`processor` is a transformers processor, or a tokenizer for a teacher without images."""
        tokenizer = getattr(processor, "tokenizer", processor)
        self._processor = processor
        # SmolVLM's processor puts settings of its own among the template's, with a warning a call, unless it gets some.
        self._render_settings = {} if tokenizer is processor else {"processor_kwargs": {"images_kwargs": {}}}
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._image_token: str = tokenizer.convert_ids_to_tokens(image_token_id) if image_token_id >= 0 else ""
        self._stops = StopTokens(tuple(eos_token_ids), tuple(tokenizer.convert_ids_to_tokens(list(eos_token_ids))))
        self._special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._first_ids = _leading_special_ids(tokenizer)
        self._takes_items, self._takes_images = self._probe()

    def build(self, sample: Sample) -> Prompt:
        """Ids and mask of a sample; of half of a preference pair only the last answer is masked, which is its own.

        SampleRefusedError: an empty answer, markers that do not fit the images, …
        """
        if sample.images and not self._takes_images:
            raise StillhouseError(self._no_place())
        messages = conversation_messages(
            sample.turns, len(sample.images), special_texts=self._special, as_items=self._takes_items
        )
        pieces = cut_pieces(messages, self._render, stops=self._stops)
        trained = iter([turn.is_trained for turn in sample.turns if turn.role == "assistant"])
        pieces = [replace(piece, is_response=next(trained)) if piece.is_response else piece for piece in pieces]
        if sample.id.endswith((CHOSEN, REJECTED)):
            pieces = [*(replace(piece, is_response=False) for piece in pieces[:-1]), *pieces[-1:]]
        prompt = tokenise(pieces, self._encode, stop_ids=self._stops.ids)
        found = int(np.count_nonzero(prompt.token_ids == self._image_token_id)) if self._image_token else 0
        if found != len(sample.images):
            raise SampleRefusedError(f"the template gave {found} image tokens for {len(sample.images)} images")
        return self._with_first_ids(prompt)

    def _render(self, messages: list[Message], open_turn: bool) -> str:
        try:
            return self._processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_turn, **self._render_settings
            )
        except Exception as error:  # templates raise whatever they like through Jinja
            raise SampleRefusedError(f"the chat template refuses the conversation: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _with_first_ids(self, prompt: Prompt) -> Prompt:
        """The prompt, with the ids that the tokenizer puts first unless the template wrote them already."""
        first = self._first_ids
        if not first or prompt.token_ids[: len(first)].tolist() == first:
            return prompt
        return Prompt(
            np.concatenate([np.array(first, np.int32), prompt.token_ids]),
            np.concatenate([np.zeros(len(first), np.bool_), prompt.response_mask]),
        )

    def _no_place(self) -> str:
        placeholder = str(getattr(self._processor, "image_token", self._image_token))
        if self._image_token and placeholder != self._image_token:
            return (
                f"{type(self._processor).__name__} marks an image's place by {placeholder} and the model its visual "
                f"tokens by {self._image_token}; of such a teacher (Gemma 3 is one) only samples without images can "
                "be dumped"
            )
        return (
            f"the teacher's chat template has no place for an image: rendering an image item gives no "
            f"{self._image_token or 'image token'}; use a checkpoint with a multimodal template"
        )

    def _probe(self) -> tuple[bool, bool]:
        """Whether the template takes content as a list of items, and whether an image item leaves its token."""
        if getattr(self._processor, "chat_template", None) is None:
            raise StillhouseError("the teacher has no chat template; add chat_template.jinja to its folder")
        items = [{"type": "image"}, {"type": "text", "text": "probe"}]
        try:
            text = self._render([{"role": "user", "content": items[1:]}], True)
            takes_items = "probe" in text and "'type'" not in text and '"type"' not in text
            seen = self._render([{"role": "user", "content": items}], True) if takes_items else ""
        except SampleRefusedError:
            return False, False
        return takes_items, bool(self._image_token) and seen.count(self._image_token) == 1


def conversation_messages(
    turns: Sequence[Turn], num_images: int, *, special_texts: Sequence[str] = (), as_items: bool = True
) -> list[Message]:
    """Chat-template messages; each `<image>` marker of a question becomes an image item in its place.

    A conversation with images and no marker shows them all before its first question, as LLaVA does.
    SampleRefusedError: an empty answer, markers in an answer or of another number than the images,
    text that spells a special token.
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
        for position, stretch in enumerate(stretches):
            if position:
                items.append({"type": "image"})
            text = stretch.strip() if len(stretches) > 1 else stretch
            if text or len(stretches) == 1:
                items.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": items if as_items else turn.text})
    return messages


def cut_pieces(messages: Sequence[Message], render: Render, *, stops: StopTokens) -> list[Piece]:
    """The rendered conversation as alternating prompt and response pieces, up to the last stop token.

    A response piece ends with its stop token; what the template writes after it belongs to the next
    prompt piece, as in generation. Where the template ends an answer with no stop token, the first of
    `stops.ids` is appended. SampleRefusedError: a template that rewrites earlier turns or the answer.
    """
    pieces: list[Piece] = []
    done = ""  # rendered text that the pieces so far cover
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = render(list(messages[:number]), True)
        whole = render(list(messages[: number + 1]), False)
        if not opened.startswith(done) or not whole.startswith(opened):
            raise SampleRefusedError(f"the chat template rewrites what comes before turn {number}")
        spoken = whole[len(opened) :]
        answer = _text_of(message).strip()
        start = spoken.find(answer)
        if start < 0 or spoken[:start].strip():
            raise SampleRefusedError(f"the chat template changes the answer of turn {number}")
        after = start + len(answer)
        stop = stops.cut(spoken[after:])
        end = after if stop is None else after + stop
        pieces.append(Piece(opened[len(done) :], is_response=False))
        pieces.append(Piece(spoken[:end], is_response=True, stop_id=stops.ids[0] if stop is None else None))
        done = opened + spoken[:end]
    return pieces


def tokenise(pieces: Sequence[Piece], encode: Callable[[str], list[int]], *, stop_ids: Sequence[int]) -> Prompt:
    """The pieces' ids one after another, each piece encoded by itself.

    SampleRefusedError: an answer that is nothing but stop tokens, since its text has no token in the vocabulary.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for piece in pieces:
        piece_ids = encode(piece.text) + ([] if piece.stop_id is None else [piece.stop_id])
        if piece.is_response and set(piece_ids) <= set(stop_ids):
            raise SampleRefusedError(f"the tokenizer makes no tokens of the answer {piece.text!r:.80}")
        ids += piece_ids
        mask += [piece.is_response] * len(piece_ids)
    return Prompt(np.array(ids, np.int32), np.array(mask, np.bool_))


def _text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(item.get("text", "") for item in content)


def _leading_special_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before any text, such as a beginning-of-sequence token."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return dressed[:start]
    return []
