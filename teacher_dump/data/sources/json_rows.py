"""Reads JSON arrays and JSON lines, one row in memory at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from storage.errors import ConfigError
from teacher_dump.data.sample import MAX_SHOWN, shorten
from teacher_dump.data.sources.row import BrokenRow, SourceRows, shorten_path

_MAX_ROW_BYTES = 64 * 2**20  # no conversation is longer
_CHUNK_BYTES = 2**20
_MAX_CHECKED_LINES = 100  # to tell whether a file holds JSON lines
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")  # where a row that is a list is a broken row
_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def read_json_rows(path: Path) -> SourceRows:
    """Yields rows of a JSON array or of JSON lines, told apart by the suffix or the first character.

    A broken line becomes a BrokenRow.

    Raises ConfigError for a file that cannot be read, a broken array, or a file that is neither.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            file.seek(0)
            is_array = start == b"[" and path.suffix.lower() not in _JSON_LINES_SUFFIXES
            if is_array:
                yield from _read_array(path, file)
            else:
                _check_lines(path, file)
                yield from _read_lines(path, file)
    except OSError as error:
        raise ConfigError(f"data.sources: {path}: {error.strerror}") from error


def parse_json(content: bytes) -> Any:
    """Parses a JSON value; returns a BrokenRow if it is invalid."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        return BrokenRow(f"is not valid JSON: {error}")


def _check_lines(path: Path, file: BinaryIO) -> None:
    """Raises ConfigError if the first line and most of the next are not JSON; rewinds `file`."""
    results: list[bool] = []
    num_checked_bytes = 0
    while len(results) < _MAX_CHECKED_LINES and num_checked_bytes < _CHUNK_BYTES:
        line = file.readline(_CHUNK_BYTES)
        if not line:
            break
        num_checked_bytes += len(line)
        if line.strip():
            is_whole = line.endswith(b"\n") or len(line) < _CHUNK_BYTES
            results.append(not isinstance(parse_json(line), BrokenRow) if is_whole else True)
        if results[:1] == [True]:
            break
    file.seek(0)
    if len(results) > 1 and not results[0] and sum(results) < len(results) / 2:
        raise ConfigError(
            f"data.sources: {path}: is neither a JSON array nor JSON lines, but {_describe_start(file)}; expected "
            "[{…}, {…}] or one {…} a line"
        )


def _describe_start(file: BinaryIO) -> str:
    """Describes the beginning of a file, for an error message; rewinds `file`."""
    start = file.read(4096).removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").lstrip()
    file.seek(0)
    field = re.match(r'\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*(.)', start, re.DOTALL)
    if field is not None:
        kind = {"[": "a list", "{": "an object", '"': "text"}.get(field[2], "a plain value")
        return f"one object over several lines, whose first field is {shorten(field[1])} ({kind})"
    return f"text that begins with {shorten(start[: MAX_SHOWN // 2])}"


def _read_lines(path: Path, file: BinaryIO) -> SourceRows:
    folder_and_name = shorten_path(path)
    number = 0
    while line := file.readline(_MAX_ROW_BYTES):
        number += 1
        place = f"{folder_and_name}:{number}"
        if len(line) == _MAX_ROW_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(_CHUNK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield place, BrokenRow(f"is longer than {_MAX_ROW_BYTES:,} bytes")
        elif line.strip():
            yield place, parse_json(line)


def _read_array(path: Path, file: BinaryIO) -> SourceRows:
    folder_and_name = shorten_path(path)
    for number, row in enumerate(_parse_items(path, file)):
        yield f"{folder_and_name}[{number}]", row


def _parse_items(path: Path, file: BinaryIO) -> Iterator[Any]:
    """Yields the items of a JSON array, parsed as the file is read."""
    text = _JsonText(path, file)
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
    else:
        yield text.parse_value()
        while text.peek() == ",":
            text.expect(",")
            yield text.parse_value()
        text.expect("]")
    if text.peek():
        raise text.make_error("there is more after the array")


class _JsonText:
    """A parser over the file's text, from the first character that is not parsed yet."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._position = 0
        self._num_consumed = 0  # characters before `_text`
        self._ended = False

    def peek(self) -> str:
        """Returns the next character that is not blank; "" at the end."""
        while True:
            blank = _BLANK.match(self._text, self._position)
            self._position = blank.end() if blank else self._position
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._read_more(_CHUNK_BYTES)

    def expect(self, character: str) -> None:
        """Consumes a character. Raises ConfigError if another one follows."""
        if self.peek() != character:
            raise self.make_error(f"expected {character!r}")
        self._position += 1

    def parse_value(self) -> Any:
        """Parses and consumes one JSON value. Raises ConfigError if it is broken or too long."""
        self.peek()
        size = _CHUNK_BYTES
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                if self._ended or isinstance(error, RecursionError):
                    raise self.make_error(str(error)) from error
                if len(self._text) - self._position > _MAX_ROW_BYTES:
                    raise self.make_error(f"a row of more than {_MAX_ROW_BYTES:,} characters, or {error}") from error
            else:
                if end < len(self._text) or self._ended:  # a number may continue in the next chunk
                    self._position = end
                    return value
            self._read_more(size)
            size *= 2

    def make_error(self, reason: str) -> ConfigError:
        """Returns the error for a fault at the current position."""
        at = self._num_consumed + self._position
        return ConfigError(f"data.sources: {self._path}: is not valid JSON: {reason}, at character {at:,}")

    def _read_more(self, size: int) -> None:
        chunk = self._file.read(size)
        self._ended = not chunk
        try:
            decoded = self._decode.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise self.make_error(f"is not UTF-8: {error.reason}") from error
        self._num_consumed += self._position
        self._text = self._text[self._position :] + decoded
        self._position = 0
