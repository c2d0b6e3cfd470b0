"""JSON arrays and JSON lines, one row in memory at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from storage.errors import ConfigError
from teacher_dump.data.sample import MAX_SHOWN, shorten
from teacher_dump.data.sources.row import Broken, Rows, short_place

_MAX_ROW_BYTES = 64 * 2**20  # a longer line is no conversation
_CHUNK_BYTES = 2**20
_LOOKED_AT = 100  # lines of a file that does not begin as an array
_LINES = (".jsonl", ".ndjson")  # where a row that is a list is a broken row
_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def json_rows(path: Path) -> Rows:
    """Rows of a JSON array, or of JSON lines: which of them, says .jsonl or else the file itself.

    A broken line is a Broken.

    ConfigError: a file that cannot be read, an array that is no JSON, a file that is neither.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            file.seek(0)
            is_array = start == b"[" and path.suffix.lower() not in _LINES
            if is_array:
                yield from _array(path, file)
            else:
                _check_lines(path, file)
                yield from _lines(path, file)
    except OSError as error:
        raise ConfigError(f"data.sources: {path}: {error.strerror}") from error


def parse_json(content: bytes) -> Any:
    """A JSON value, or a Broken."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        return Broken(f"is not valid JSON: {error}")


def _check_lines(path: Path, file: BinaryIO) -> None:
    """ConfigError: most of the first lines, the very first among them, are no JSON; `file` stays at its start."""
    results: list[bool] = []
    looked_at = 0
    while len(results) < _LOOKED_AT and looked_at < _CHUNK_BYTES and (line := file.readline(_CHUNK_BYTES)):
        looked_at += len(line)
        if line.strip():
            is_whole = line.endswith(b"\n") or len(line) < _CHUNK_BYTES
            results.append(not isinstance(parse_json(line), Broken) if is_whole else True)
        if results[:1] == [True]:
            break
    file.seek(0)
    if len(results) > 1 and not results[0] and sum(results) < len(results) / 2:
        raise ConfigError(
            f"data.sources: {path}: is neither a JSON array nor JSON lines, but {_describe(file)}; expected "
            "[{…}, {…}] or one {…} a line"
        )


def _describe(file: BinaryIO) -> str:
    """What a file begins with, for a message; `file` stays at its start."""
    start = file.read(4096).removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").lstrip()
    file.seek(0)
    field = re.match(r'\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*(.)', start, re.DOTALL)
    if field is not None:
        kind = {"[": "a list", "{": "an object", '"': "text"}.get(field[2], "a plain value")
        return f"one object over several lines, whose first field is {shorten(field[1])} ({kind})"
    return f"text that begins with {shorten(start[: MAX_SHOWN // 2])}"


def _lines(path: Path, file: BinaryIO) -> Rows:
    folder_and_name = short_place(path)
    number = 0
    while line := file.readline(_MAX_ROW_BYTES):
        number += 1
        place = f"{folder_and_name}:{number}"
        if len(line) == _MAX_ROW_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(_CHUNK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield place, Broken(f"is longer than {_MAX_ROW_BYTES:,} bytes")
        elif line.strip():
            yield place, parse_json(line)


def _array(path: Path, file: BinaryIO) -> Rows:
    folder_and_name = short_place(path)
    for number, row in enumerate(_items(path, file)):
        yield f"{folder_and_name}[{number}]", row


def _items(path: Path, file: BinaryIO) -> Iterator[Any]:
    """The items of a JSON array, parsed as the file is read."""
    text = _Text(path, file)
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
    else:
        yield text.value()
        while text.peek() == ",":
            text.expect(",")
            yield text.value()
        text.expect("]")
    if text.peek():
        raise text.broken("there is more after the array")


class _Text:
    """The file's text from the first character that is not parsed yet."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._done = 0  # characters before `_text`
        self._ended = False

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            self._at = blank.end() if blank else self._at
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more(_CHUNK_BYTES)

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise self.broken(f"expected {character!r}")
        self._at += 1

    def value(self) -> Any:
        self.peek()
        size = _CHUNK_BYTES
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._ended or isinstance(error, RecursionError):
                    raise self.broken(str(error)) from error
                if len(self._text) - self._at > _MAX_ROW_BYTES:
                    raise self.broken(f"a row of more than {_MAX_ROW_BYTES:,} characters, or {error}") from error
            else:
                if end < len(self._text) or self._ended:  # a number at the end may go on
                    self._at = end
                    return value
            self._more(size)
            size *= 2

    def broken(self, reason: str) -> ConfigError:
        at = self._done + self._at
        return ConfigError(f"data.sources: {self._path}: is not valid JSON: {reason}, at character {at:,}")

    def _more(self, size: int) -> None:
        chunk = self._file.read(size)
        self._ended = not chunk
        try:
            decoded = self._decode.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise self.broken(f"is no UTF-8: {error.reason}") from error
        self._done += self._at
        self._text = self._text[self._at :] + decoded
        self._at = 0
