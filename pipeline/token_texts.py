"""Texts of token ids, made safe to show: by the teacher's own tokenizer, or the bare ids where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.errors import ConfigError, StillhouseError
from storage.identity import Identity, tokenizer_fingerprint

_MARKS = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "·"}
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Decoder:
    """What is needed of a tokenizer."""

    decode: Callable[[list[int]], str]  # special tokens included
    spell: Callable[[int], str]  # one token as it is in the vocabulary


class TokenTexts:
    """What ids say. `note` tells a person which tokenizer speaks, or why ids are shown."""

    def __init__(self, decoder: Decoder | None, note: str) -> None:
        self.note = note
        self._decoder = decoder

    @property
    def decodes(self) -> bool:
        """False where only ids can be shown."""
        return self._decoder is not None

    def one(self, token_id: int) -> str:
        """A single token with its spaces and line ends visible; a piece of a character as the tokenizer spells it."""
        if self._decoder is None:
            return f"#{token_id}"
        text, spelling = self._decoder.decode([token_id]), self._decoder.spell(token_id)
        if _BROKEN in text:
            text = spelling
        elif spelling.startswith("▁") and not text.startswith(" "):
            text = f" {text}"  # sentencepiece drops the space of a first word
        return mark_spaces(text) or "∅"

    def many(self, token_ids: Sequence[int]) -> str:
        """Running text, special tokens included."""
        if self._decoder is None:
            return " ".join(f"#{token_id}" for token_id in token_ids)
        return self._decoder.decode([int(token_id) for token_id in token_ids])


def token_texts(identity: Identity, folder: Path | None) -> TokenTexts:
    """The texts by the tokenizer in `folder`, or else in the teacher's own folder if it still lies there.

    Errors: ConfigError if `folder` is given and its tokenizer is not the one of the cache. The teacher's folder
    is only tried, nothing is downloaded: what is wrong with it ends in `note`.
    """
    if folder is not None:
        return TokenTexts(_matching(folder, identity), f"texts by the tokenizer in {folder}")
    advice = "give the teacher's tokenizer as --tokenizer DIR"
    if not Path(identity.teacher).is_dir():
        return TokenTexts(None, f"token ids, since the teacher's folder {identity.teacher!r} is not here; {advice}")
    try:
        decoder = _matching(Path(identity.teacher), identity)
    except (StillhouseError, ImportError) as error:
        return TokenTexts(None, f"token ids, since {error}; {advice}")
    return TokenTexts(decoder, f"texts by the tokenizer in {identity.teacher}")


def _matching(folder: Path, identity: Identity) -> Decoder:
    if not folder.is_dir():
        raise ConfigError(f"--tokenizer {folder} is not a folder")
    return _plain(folder, identity) or _by_transformers(folder, identity)


def _plain(folder: Path, identity: Identity) -> Decoder | None:
    """By tokenizer.json alone, without the seconds that transformers takes; None if that is not the whole tokenizer."""
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library raises nothing narrower; transformers then tells what is wrong
        return None
    if tokenizer_fingerprint(tokenizer.get_vocab(with_added_tokens=True)) != identity.tokenizer_fingerprint:
        return None
    return Decoder(
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        spell=lambda token_id: str(tokenizer.id_to_token(token_id)),
    )


def _by_transformers(folder: Path, identity: Identity) -> Decoder:
    from student_train.huggingface import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except StillhouseError as error:
        raise ConfigError(str(error)) from error
    got = tokenizer_fingerprint(tokenizer.get_vocab())
    if got != identity.tokenizer_fingerprint:
        raise ConfigError(
            f"the tokenizer in {folder} has the fingerprint {got[:12]}…, the cache was made with "
            f"{identity.tokenizer_fingerprint[:12]}…, so it would read the ids wrongly"
        )
    return Decoder(
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        spell=lambda token_id: str(tokenizer.convert_ids_to_tokens(token_id)),
    )


def mark_spaces(text: str) -> str:
    """One token's text with spaces, tabs and line ends as marks and everything that does not print escaped."""
    return printable("".join(_MARKS.get(character, character) for character in text))


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control and direction characters become escapes, line ends and tabs stay."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )
