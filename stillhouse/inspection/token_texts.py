"""Turns token ids into texts that are safe to show: by the teacher's tokenizer, or as bare ids where there is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.errors import ConfigError, StillhouseError
from storage.identity import Identity, compute_tokenizer_fingerprint

_MARKS = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "·"}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # a decoder's sign for bytes that are no whole character
_CONTINUED = "\N{MIDLINE HORIZONTAL ELLIPSIS}"  # stands for a token whose character a later one completes
_MAX_PIECES = 8  # a character has at most 4 bytes; the other tokens may carry the beginnings of their neighbours
# Bytes that byte-level BPE writes as the letter of the same number.
_PRINTED_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


@dataclass(frozen=True)
class Decoder:
    """The functions of a tokenizer that this file needs."""

    decode: Callable[[list[int]], str]  # special tokens included
    decode_plain: Callable[[list[int]], str]  # without them
    get_spelling: Callable[[int], str]  # one token as it is in the vocabulary


class TokenTexts:
    """Texts of token ids. `note` names the tokenizer, or says why ids are shown instead."""

    def __init__(self, decoder: Decoder | None, note: str) -> None:
        self.note = note
        self._decoder = decoder

    @property
    def has_decoder(self) -> bool:
        """False where only ids can be shown."""
        return self._decoder is not None

    def describe_token(self, token_id: int) -> str:
        """A single token with its spaces and line ends visible; a piece of a character as bytes, such as ‹E8 BF›."""
        if self._decoder is None:
            return f"#{token_id}"
        text, spelling = self._decoder.decode([token_id]), self._decoder.get_spelling(token_id)
        if _REPLACEMENT in text:
            text = _describe_bytes(spelling)
        elif spelling.startswith("▁") and not text.startswith(" "):
            text = f" {text}"  # sentencepiece drops the space of a first word
        return mark_spaces(text) or "∅"

    def describe_tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens of a text, one by one. Of tokens that make up a character together, the last one has it.

        The others have a mark. Pieces that make up no character are shown as `describe_token` shows them.
        """
        ids = [int(token_id) for token_id in token_ids]
        if self._decoder is None:
            return [self.describe_token(token_id) for token_id in ids]
        texts: list[str] = []
        while len(texts) < len(ids):
            start = len(texts)
            num_pieces = self._count_pieces(ids[start : start + _MAX_PIECES])
            if num_pieces < 2:
                texts.append(self.describe_token(ids[start]))
            else:
                whole = self._decoder.decode(ids[start : start + num_pieces])
                texts += [_CONTINUED] * (num_pieces - 1) + [mark_spaces(whole)]
        return texts

    def _count_pieces(self, ids: Sequence[int]) -> int:
        """The smallest number of first ids that decode to whole characters; 1 if there is no such number."""
        assert self._decoder is not None
        for count in range(1, len(ids) + 1):
            if _REPLACEMENT not in self._decoder.decode(list(ids[:count])):
                return count
        return 1

    def decode(self, token_ids: Sequence[int]) -> str:
        """Running text, special tokens included."""
        if self._decoder is None:
            return " ".join(f"#{token_id}" for token_id in token_ids)
        return self._decoder.decode([int(token_id) for token_id in token_ids])

    def decode_plain(self, token_ids: Sequence[int]) -> str:
        """Running text without special tokens; ids where there is no tokenizer."""
        if self._decoder is None:
            return self.decode(token_ids)
        return self._decoder.decode_plain([int(token_id) for token_id in token_ids])


def load_token_texts(identity: Identity, folder: Path | None) -> TokenTexts:
    """Texts by the tokenizer in `folder`, or else by that in the teacher's own folder if it still exists.

    ConfigError if `folder` is given and its tokenizer is not the one of the cache. A teacher's folder that is
    missing or has another tokenizer is no error: `note` then says what is wrong. Nothing is downloaded.
    """
    if folder is not None:
        return TokenTexts(_load_decoder(folder, identity), f"texts by the tokenizer in {folder}")
    advice = "give the teacher's tokenizer as --tokenizer DIR"
    if not Path(identity.teacher).is_dir():
        return TokenTexts(None, f"token ids, since the teacher's folder {identity.teacher!r} is not here; {advice}")
    try:
        decoder = _load_decoder(Path(identity.teacher), identity)
    except (StillhouseError, ImportError) as error:
        return TokenTexts(None, f"token ids, since {error}; {advice}")
    return TokenTexts(decoder, f"texts by the tokenizer in {identity.teacher}")


def _load_decoder(folder: Path, identity: Identity) -> Decoder:
    if not folder.is_dir():
        raise ConfigError(f"--tokenizer {folder} is not a folder")
    return _load_by_tokenizers(folder, identity) or _load_by_transformers(folder, identity)


def _load_by_tokenizers(folder: Path, identity: Identity) -> Decoder | None:
    """By tokenizer.json alone; None if that is missing or not the whole tokenizer of the cache."""
    try:
        from tokenizers import Tokenizer  # absent where only storage is installed

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library raises nothing narrower; transformers then says what is wrong
        return None
    if compute_tokenizer_fingerprint(tokenizer.get_vocab(with_added_tokens=True)) != identity.tokenizer_fingerprint:
        return None
    return Decoder(
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        decode_plain=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        get_spelling=lambda token_id: str(tokenizer.id_to_token(token_id)),
    )


def _load_by_transformers(folder: Path, identity: Identity) -> Decoder:
    from student_train.models.huggingface import load_tokenizer  # transformers: seconds

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
        decode_plain=lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        get_spelling=lambda token_id: str(tokenizer.convert_ids_to_tokens(token_id)),
    )


def _map_letters_to_bytes() -> dict[str, int]:
    """The letters of byte-level BPE, one for each byte: itself if it prints, or the next from U+0100 on.

    Source: GPT-2's encoder.py, bytes_to_unicode.
    """
    others = [byte for byte in range(0x100) if byte not in _PRINTED_BYTES]
    letters = {chr(byte): byte for byte in _PRINTED_BYTES}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def _describe_bytes(spelling: str) -> str:
    """A piece of a character as its bytes, from byte-level BPE's letters or SentencePiece's <0xE8>."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", spelling):
        return f"‹{spelling[3:5].upper()}›"
    letters = _map_letters_to_bytes()
    if not all(letter in letters for letter in spelling):
        return spelling  # of another kind of vocabulary
    return _decode_escaping_rest(bytes(letters[letter] for letter in spelling))


def _decode_escaping_rest(content: bytes) -> str:
    """UTF-8 text with the bytes that make up no whole character as ‹E8 BF›."""
    text = ""
    while content:
        try:
            return text + content.decode()
        except UnicodeDecodeError as error:
            broken = content[error.start : error.end]
            text += f"{content[: error.start].decode()}‹{broken.hex(' ').upper()}›"
            content = content[error.end :]
    return text


def mark_spaces(text: str) -> str:
    """One token's text with spaces, tabs and line ends as marks and everything that does not print escaped."""
    return escape_unprintable("".join(_MARKS.get(character, character) for character in text))


def escape_unprintable(text: str) -> str:
    """Text that cannot steer a terminal: control and direction characters become escapes, line ends and tabs stay."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )
