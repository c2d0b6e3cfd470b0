"""Texts of token ids, made safe to show: by the teacher's own tokenizer, or the bare ids where there is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.errors import ConfigError, StillhouseError
from storage.identity import Identity, compute_tokenizer_fingerprint

_MARKS = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "·"}
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_PIECE = "\N{MIDLINE HORIZONTAL ELLIPSIS}"  # stands for a token whose character a later one completes
_MAX_PIECES = 8  # a character has at most 4 bytes; the other tokens may carry the beginnings of their neighbours
_PRINTED_BYTES = (
    *range(0x21, 0x7F),
    *range(0xA1, 0xAD),
    *range(0xAE, 0x100),
)  # which byte-level BPE spells as they are


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
        """A single token with its spaces and line ends visible; a piece of a character as bytes, such as ‹E8 BF›."""
        if self._decoder is None:
            return f"#{token_id}"
        text, spelling = self._decoder.decode([token_id]), self._decoder.spell(token_id)
        if _BROKEN in text:
            text = _shown_bytes(spelling)
        elif spelling.startswith("▁") and not text.startswith(" "):
            text = f" {text}"  # sentencepiece drops the space of a first word
        return mark_spaces(text) or "∅"

    def each(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens of a text. Of those that make up a character together, the last has it and the others a mark.

        Pieces that make up none are shown as `one` shows them.
        """
        ids = [int(token_id) for token_id in token_ids]
        if self._decoder is None:
            return [self.one(token_id) for token_id in ids]
        texts: list[str] = []
        while len(texts) < len(ids):
            start = len(texts)
            num_pieces = self._num_pieces(ids[start : start + _MAX_PIECES])
            if num_pieces < 2:
                texts.append(self.one(ids[start]))
            else:
                whole = self._decoder.decode(ids[start : start + num_pieces])
                texts += [_PIECE] * (num_pieces - 1) + [mark_spaces(whole)]
        return texts

    def _num_pieces(self, ids: Sequence[int]) -> int:
        """How many of the first ids make up whole characters, none of them by itself; 1 if there is no such number."""
        assert self._decoder is not None
        for count in range(1, len(ids) + 1):
            if _BROKEN not in self._decoder.decode(list(ids[:count])):
                return count
        return 1

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
    if compute_tokenizer_fingerprint(tokenizer.get_vocab(with_added_tokens=True)) != identity.tokenizer_fingerprint:
        return None
    return Decoder(
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        spell=lambda token_id: str(tokenizer.id_to_token(token_id)),
    )


def _by_transformers(folder: Path, identity: Identity) -> Decoder:
    from student_train.models.huggingface import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except StillhouseError as error:
        raise ConfigError(str(error)) from error
    got = compute_tokenizer_fingerprint(tokenizer.get_vocab())
    if got != identity.tokenizer_fingerprint:
        raise ConfigError(
            f"the tokenizer in {folder} has the fingerprint {got[:12]}…, the cache was made with "
            f"{identity.tokenizer_fingerprint[:12]}…, so it would read the ids wrongly"
        )
    return Decoder(
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        spell=lambda token_id: str(tokenizer.convert_ids_to_tokens(token_id)),
    )


def _byte_letters() -> dict[str, int]:
    """Byte-level BPE spells a byte as one letter: those that print as themselves, the others from U+0100 on.

    Source: GPT-2's encoder.py, bytes_to_unicode.
    """
    others = [byte for byte in range(0x100) if byte not in _PRINTED_BYTES]
    letters = {chr(byte): byte for byte in _PRINTED_BYTES}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def _shown_bytes(spelling: str) -> str:
    """A piece of a character as its bytes, from byte-level BPE's letters or SentencePiece's <0xE8>."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", spelling):
        return f"‹{spelling[3:5].upper()}›"
    letters = _byte_letters()
    if not all(letter in letters for letter in spelling):
        return spelling  # of another kind of vocabulary
    return _with_bytes(bytes(letters[letter] for letter in spelling))


def _with_bytes(content: bytes) -> str:
    """UTF-8 with what is no whole character in it as ‹E8 BF›, and a byte of ASCII as itself."""
    shown = ""
    while content:
        try:
            return shown + content.decode()
        except UnicodeDecodeError as error:
            broken = content[error.start : error.end]
            shown += f"{content[: error.start].decode()}‹{broken.hex(' ').upper()}›"
            content = content[error.end :]
    return shown


def mark_spaces(text: str) -> str:
    """One token's text with spaces, tabs and line ends as marks and everything that does not print escaped."""
    return printable("".join(_MARKS.get(character, character) for character in text))


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control and direction characters become escapes, line ends and tabs stay."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )
