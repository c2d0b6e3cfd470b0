"""The teacher's chat template: renders conversations and locates their answers in the rendered text.

An answer starts where the generation prompt ends (`add_generation_prompt`) and stops with the token that the template
writes after it. If the template writes nothing there, the tokenizer's end-of-sequence token is inserted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.errors import ConfigError, StillhouseError
from storage.images.placeholders import write_visual_tokens
from teacher_dump.data.sample import SampleRefusedError

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]  # messages, whether to open the assistant's turn

_SHOWN = 40  # characters of a rendered text in an error


class TemplateRefusedError(SampleRefusedError):
    """The template raised an error for a conversation."""


@dataclass(frozen=True)
class StopToken:
    """One token that can end an answer."""

    id: int
    text: str


@dataclass(frozen=True)
class StopTokens:
    """The teacher's stop tokens, and all other tokens that a template may write after an answer."""

    known: tuple[StopToken, ...]  # of the tokenizer and of generation_config.json, the tokenizer's own first
    candidates: tuple[StopToken, ...] = ()  # the tokenizer's other added tokens
    openers: frozenset[str] = frozenset()  # tokens that can never end an answer: begin of sequence, image, unknown

    @staticmethod
    def from_tokenizer(tokenizer: Any, ids: Sequence[int], *, image_token: str = "") -> StopTokens:
        """Reads the stop tokens of a transformers tokenizer; `ids` are the known ones."""
        known = tuple(StopToken(one, tokenizer.convert_ids_to_tokens(one)) for one in ids)
        texts = {one.text for one in known}
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        candidates = tuple(StopToken(number, text) for number, text in added.items() if text not in texts)
        never = {image_token, tokenizer.bos_token, tokenizer.unk_token} - {None, "", *texts}
        return StopTokens(known, candidates, frozenset(never))

    def find_after_answer(self, closing: str, place: str) -> tuple[StopToken, int] | None:
        """Finds the stop token in `closing`, the text after an answer; returns it and its end. None: no text.

        Raises SampleRefusedError if the template writes something that is not a stop token.
        """
        first = _find_first_token(closing, self.known)
        other = _find_first_token(closing, self.candidates)
        if other is not None and not closing[: other[1]].strip() and (first is None or other[1] < first[1]):
            token, start = other
            if token.text in self.openers:
                raise SampleRefusedError(self._explain_undecided(token.text, place))
            return token, start + len(token.text)
        if first is not None:
            token, start = first
            return token, start + len(token.text)
        if closing.strip():
            raise SampleRefusedError(self._explain_undecided(_shorten(closing), place))
        return None

    def _explain_undecided(self, written: str, place: str) -> str:
        own = self.known[0].text if self.known else "no token"
        return (
            f"the chat template writes {written!r} after the answer of {place}, and the tokenizer ends a sequence by "
            f"{own!r}: it is not clear which of them the teacher generates; correct eos_token or the template"
        )


@dataclass(frozen=True)
class AnswerSpan:
    """An answer in the text of a rendered conversation."""

    turn: int
    start: int  # the end of the generation prompt
    stop_token: StopToken  # its first occurrence after `start` ends the answer


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation's text, in which every answer has a stop token."""

    text: str
    spans: tuple[AnswerSpan, ...]


class ChatTemplate:
    """A processor's chat template, with the arguments of the config."""

    def __init__(self, processor: Any, arguments: Mapping[str, Any] | None = None) -> None:
        """`processor` is a transformers processor or tokenizer.

        Raises StillhouseError if it has no template; ConfigError for an argument that the template does not read,
        and for a template that writes today's date.
        """
        self._processor = processor
        self._arguments = dict(arguments or {})
        template = getattr(processor, "chat_template", None)
        if template is None:
            raise StillhouseError("the teacher has no chat template; add chat_template.jinja to its folder")
        self._source = template if isinstance(template, str) else "\n".join(map(str, template.values()))
        for name in self._arguments:
            if not self._mentions(name):
                raise ConfigError(
                    f"teacher.chat_template_arguments.{name}: the teacher's chat template does not read {name}; "
                    "correct the name or leave it out"
                )
        # SmolVLM's processor adds its own settings to the template's, with a warning at each call, unless given some.
        is_tokenizer = getattr(processor, "tokenizer", processor) is processor
        self._settings = {} if is_tokenizer else {"processor_kwargs": {"images_kwargs": {}}}
        self._check_date()

    def render(self, messages: list[Message], open_turn: bool) -> str:
        """Renders `messages`, with the start of an assistant's turn if `open_turn`."""
        return self._render(messages, open_turn)

    def supports_items(self) -> bool:
        """Returns whether a message's content may be a list of items."""
        try:
            text = self.render([{"role": "user", "content": [{"type": "text", "text": "probe"}]}], True)
        except TemplateRefusedError:
            return False
        return "probe" in text and "'type'" not in text and '"type"' not in text

    def supports_images(self, image_token: str) -> bool:
        """Returns whether an image item renders as one image token."""
        items = [{"type": "image"}, {"type": "text", "text": "probe"}]
        try:
            text = self.render([{"role": "user", "content": items}], True) if image_token else ""
        except TemplateRefusedError:
            return False
        return bool(image_token) and text.count(image_token) == 1

    def _render(self, messages: list[Message], open_turn: bool, **more: Any) -> str:
        try:
            text = self._processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_turn, **self._settings, **self._arguments, **more
            )
        except Exception as error:  # templates raise whatever they like through Jinja
            raise TemplateRefusedError(f"the chat template refuses the conversation: {error}") from error
        return write_visual_tokens(text, self._processor)

    def _mentions(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self._source) is not None

    def _check_date(self) -> None:
        """Raises ConfigError for a template that writes today's date: token ids would change from day to day."""
        if not self._mentions("strftime_now"):
            return
        clocks = [lambda _format, day=day: day for day in ("1 January", "2 February")]
        for content in ("probe", [{"type": "text", "text": "probe"}]):
            messages: list[Message] = [{"role": "user", "content": content}]
            try:
                texts = {self._render(messages, True, strftime_now=clock) for clock in clocks}
            except TemplateRefusedError:
                continue
            if len(texts) > 1:
                raise ConfigError(
                    "the teacher's chat template writes today's date, so that token ids would change from day to day; "
                    "fix the date by teacher.chat_template_arguments (often date_string: 26 Jul 2024)"
                )


def locate_answers(messages: Sequence[Message], render: Render, *, stops: StopTokens) -> RenderedConversation:
    """Renders the conversation and locates its answers.

    The text before an answer is its generation prompt, and the text up to its stop token is that of the conversation
    that ends there. Raises SampleRefusedError if the template renders otherwise, with what it writes.
    """
    whole = render(list(messages), False)
    text = ""
    done = 0  # characters of `whole` that `text` covers
    spans: list[AnswerSpan] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        is_last = number + 1 == len(messages)
        opened = render(list(messages[:number]), True)
        closed = whole if is_last else render(list(messages[: number + 1]), False)
        if not closed.startswith(opened):
            raise SampleRefusedError(_explain_opening(opened, closed, number))
        end = _find_answer_end(closed, len(opened), get_message_text(message), number)
        closing = closed[end:]
        if not closing.strip() and any(whole[end:].lstrip().startswith(one.text) for one in stops.known):
            closing = whole[end:]  # the next turn's opening writes it
        found = stops.find_after_answer(closing, f"turn {number}")
        shown = opened + closed[len(opened) : end] + ("" if found is None else closing[: found[1]])
        if not whole.startswith(shown):
            raise SampleRefusedError(_explain_rewrite(shown, whole, number))
        text += whole[done : len(opened)]
        stop_token = stops.known[0] if found is None else found[0]
        spans.append(AnswerSpan(number, len(text), stop_token))
        text += whole[len(opened) : len(shown)] + (stop_token.text if found is None else "")
        done = len(shown)
    return RenderedConversation(text + whole[done:], tuple(spans))


def find_written_stop_id(
    template: ChatTemplate, tokenizer: Any, known_ids: Sequence[int], *, image_token: str
) -> int | None:
    """Returns the token that the template writes after an answer; None if there is none, or it is not clear."""
    stops = StopTokens.from_tokenizer(tokenizer, known_ids, image_token=image_token)
    as_items = template.supports_items()
    texts = {"user": "probe", "assistant": "0"}
    messages: list[Message] = [
        {"role": role, "content": [{"type": "text", "text": text}] if as_items else text}
        for role, text in texts.items()
    ]
    try:
        whole = template.render(messages, False)
        opened = template.render(messages[:1], True)
        start = len(opened) if whole.startswith(opened) else whole.rindex("0")
        found = stops.find_after_answer(whole[_find_answer_end(whole, start, "0", 1) :], "turn 1")
    except (SampleRefusedError, ValueError):
        return None
    return None if found is None else found[0].id


def get_message_text(message: Message) -> str:
    """Returns a message's text without its images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(item.get("text", "") for item in content)


def _find_answer_end(closed: str, start: int, answer: str, number: int) -> int:
    """Returns the end of an answer's text in the conversation that ends with it."""
    spoken = closed[start:]
    lead = len(spoken) - len(spoken.lstrip())
    stripped = answer.strip()
    if spoken.startswith(stripped, lead):
        kept = answer.lstrip()  # with the white space at its end, if the template keeps it
        return start + lead + len(kept if spoken.startswith(kept, lead) else stripped)
    before, is_there, _ = spoken.rpartition(stripped)
    if is_there and before.strip():
        raise SampleRefusedError(
            f"the chat template writes {_shorten(before)!r} before the answer of turn {number}, which generation does "
            f"not see in its prompt; {_ARGUMENTS_HINT}"
        )
    raise SampleRefusedError(
        f"the chat template changes the answer of turn {number}: it writes {_shorten(spoken)!r} "
        f"for {_shorten(stripped)!r}"
    )


_ARGUMENTS_HINT = (
    "an argument of the template may change that (teacher.chat_template_arguments, such as enable_thinking: false)"
)


def _explain_opening(opened: str, closed: str, number: int) -> str:
    same = _count_common_prefix(opened, closed)
    return (
        f"the chat template writes {_shorten(opened[same:])!r} for generation where turn {number} starts, and "
        f"{_shorten(closed[same:])!r} where the conversation has its answer; {_ARGUMENTS_HINT}"
    )


def _explain_rewrite(shown: str, whole: str, number: int) -> str:
    same = _count_common_prefix(shown, whole)
    return (
        f"the chat template rewrites turn {number} once later turns follow: it writes {_shorten(whole[same:])!r} in "
        f"place of {_shorten(shown[same:])!r}; give a conversation that ends there as a sample of its own"
    )


def _count_common_prefix(one: str, other: str) -> int:
    """Returns the length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def _find_first_token(text: str, tokens: Iterable[StopToken]) -> tuple[StopToken, int] | None:
    """Returns the token that comes first in a text, the longest of several at one position, and its start."""
    found = [(text.index(token.text), -len(token.text), token) for token in tokens if token.text in text]
    if not found:
        return None
    start, _, token = min(found, key=lambda one: one[:2])
    return token, start


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
