"""Converts records to the columns of parquet_schema.py and back, one mapping of columns per Parquet row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.config import HiddenSection, RelationSection
from storage.encoding.hidden_states import compute_relative_errors, decode_hidden, encode_hidden, read_hidden_encoding
from storage.encoding.parquet_schema import KEY_COLUMNS
from storage.encoding.relation_matrix import compute_stored_norm, decode_relation, encode_relation, read_cosine_error
from storage.errors import CorruptPartError
from storage.identity import Identity
from storage.records.records import ImageRef, Relation, RelationMatrix, SequenceLogprob, TokensRecord
from storage.records.sample_key import SampleKey

Columns = Mapping[str, Any]


def encode_tokens_row(record: TokensRecord) -> Columns:
    """Encodes a tokens row; the response mask becomes spans."""
    starts, stops = _make_spans(record.response_mask)
    return {
        "sample_id": record.sample_id,
        "row_id": record.key.row_id,
        "half": record.key.half or "",
        "copy": record.key.copy,
        "source": record.key.source,
        "split": record.split,
        "category": record.category,
        "num_tokens": len(record.token_ids),
        "num_response_tokens": record.num_response_tokens,
        "token_ids": record.token_ids,
        "response_starts": starts,
        "response_stops": stops,
        "image_paths": [image.path for image in record.images],
        "image_sha256s": [image.sha256 for image in record.images],
        "image_visual_tokens": np.array([image.num_visual_tokens for image in record.images], np.int32),
        "image_keys": [image.key for image in record.images],
    }


def decode_tokens_row(table: pa.Table, row: int, identity: Identity) -> TokensRecord:
    """Decodes a tokens row. CorruptPartError (or ValueError) for spans, ids or paths out of bounds."""
    token_ids = _read_numbers(table, "token_ids", row)
    starts, stops = _read_numbers(table, "response_starts", row), _read_numbers(table, "response_stops", row)
    mask = _make_mask(starts, stops, len(token_ids))
    check_token_ids(token_ids, identity)
    if table["num_tokens"][row].as_py() != len(token_ids):
        raise CorruptPartError(f"num_tokens is not the number of token ids, {len(token_ids)}")
    if table["num_response_tokens"][row].as_py() != np.count_nonzero(mask):
        raise CorruptPartError(f"num_response_tokens is not what the spans hold, {np.count_nonzero(mask)}")
    placeholders = int(np.count_nonzero(token_ids == identity.image_token_id))
    names = ("image_paths", "image_sha256s", "image_visual_tokens", "image_keys")
    images = [ImageRef(*image) for image in zip(*(table[name][row].as_py() for name in names), strict=True)]
    if placeholders != len(images):
        raise CorruptPartError(f"{placeholders} image placeholders for {len(images)} images")
    return TokensRecord(
        key=decode_keys(table.slice(row, 1))[0],
        split=table["split"][row].as_py(),
        category=table["category"][row].as_py(),
        token_ids=token_ids,
        response_mask=mask,
        images=tuple(images),
    )


def decode_keys(table: pa.Table) -> list[SampleKey]:
    """Decodes the keys of a tokens table. CorruptPartError (or ValueError) unless `sample_id` is the text of each."""
    columns = (table[name].to_pylist() for name in KEY_COLUMNS)
    keys = [SampleKey(row_id, half or None, *numbers) for row_id, half, *numbers in zip(*columns, strict=True)]
    for key, sample_id in zip(keys, table["sample_id"].to_pylist(), strict=True):
        if key.sample_id != sample_id:
            raise CorruptPartError(f"sample {sample_id!r} has the key of {key.sample_id!r}")
    return keys


def check_token_ids(token_ids: NDArray[np.int32], identity: Identity) -> None:
    """Raises ValueError unless every id is in the vocabulary or is the image placeholder."""
    known = (token_ids >= 0) & (token_ids < identity.vocab_size) | (token_ids == identity.image_token_id)
    if not known.all():
        raise ValueError(f"token id {token_ids[~known][0]} is outside 0..{identity.vocab_size - 1}")


def encode_relation_row(matrix: RelationMatrix, section: RelationSection) -> Columns:
    """Encodes a relation row, without its key. ValueError for a matrix that a cache may not store."""
    payload = encode_relation(matrix, section)
    return {
        "num_rows": len(matrix.values),
        "norm": np.float32(compute_stored_norm(matrix, section)),
        "payload": payload,
    }


def decode_relation_row(table: pa.Table, row: int, num_visual_tokens: int) -> Relation:
    """Decodes a relation row. CorruptPartError unless its payload and columns fit the image."""
    norm = table["norm"][row].as_py()
    matrix = decode_relation(_read_payload(table, row), norm=norm, num_visual_tokens=num_visual_tokens)
    if table["num_rows"][row].as_py() != num_visual_tokens:
        raise CorruptPartError(f"relation payload has n = {num_visual_tokens}, its column says otherwise")
    return matrix


def encode_hidden_row(states: NDArray[np.float32], section: HiddenSection) -> Columns:
    """Encodes a hidden row, without its sample id. ValueError for states that a cache may not store."""
    payload = encode_hidden(states, section.encoding)
    errors = compute_relative_errors(states, decode_hidden(payload))
    return {"num_rows": len(states), "width": states.shape[1], "relative_error": errors, "payload": payload}


def decode_hidden_row(table: pa.Table, row: int, section: HiddenSection) -> NDArray[np.float32]:
    """Decodes a hidden row, (r, d). CorruptPartError unless columns, payload and section agree."""
    states = decode_hidden(_read_payload(table, row))
    if read_hidden_encoding(_read_payload(table, row)) != section.encoding:
        raise CorruptPartError(f"hidden payload is not in the cache's encoding, {section.encoding}")
    stated = (table["num_rows"][row].as_py(), table["width"][row].as_py())
    errors = _read_numbers(table, "relative_error", row)
    if states.shape != stated or len(errors) != len(states) or not (np.isfinite(errors) & (errors >= 0)).all():
        raise CorruptPartError(f"hidden payload is {states.shape}, its columns say {stated} and {len(errors)} errors")
    return states


def encode_sequence_row(sequence: SequenceLogprob) -> Columns:
    """Encodes a sequence row, without its sample id."""
    return {"num_tokens": sequence.num_tokens, "logprob": np.float32(sequence.logprob)}


def decode_sequence_row(table: pa.Table, row: int) -> SequenceLogprob:
    """Decodes a sequence row."""
    return SequenceLogprob(table["logprob"][row].as_py(), table["num_tokens"][row].as_py())


def encode_image_row(sha256: str, content: bytes) -> Columns:
    """Encodes an images row."""
    return {"sha256": sha256, "num_bytes": len(content), "payload": content}


def decode_image_row(table: pa.Table, row: int) -> bytes:
    """Returns the file content of an images row. CorruptPartError unless hash and size match its columns."""
    content = table["payload"][row].as_py()
    stated, got = table["sha256"][row].as_py(), hashlib.sha256(content).hexdigest()
    if got != stated or len(content) != table["num_bytes"][row].as_py():
        raise CorruptPartError(f"image {stated} has {len(content)} bytes with the sha256 {got}")
    return content


def collect_encoding_errors(family: str, rows: Iterable[Columns]) -> list[float]:
    """Returns the encoding errors of rows, in order; empty for a family without an error measure."""
    if family == "relation":
        return [read_cosine_error(row["payload"]) for row in rows]
    return [float(error) for row in rows for error in row["relative_error"]] if family == "hidden" else []


def _read_payload(table: pa.Table, row: int) -> memoryview:
    return memoryview(table["payload"][row].as_buffer())


def _read_numbers(table: pa.Table, name: str, row: int) -> NDArray:
    # A copy: a view would keep the whole row group in memory, and could not be written to.
    return table[name][row].values.to_numpy(zero_copy_only=False, writable=True)


def _make_spans(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    edges = np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))
    return np.flatnonzero(edges == 1).astype(np.int32), np.flatnonzero(edges == -1).astype(np.int32)


def _make_mask(starts: NDArray[np.int32], stops: NDArray[np.int32], num_tokens: int) -> NDArray[np.bool_]:
    if len(starts) != len(stops):
        raise CorruptPartError(f"{len(starts)} response spans start and {len(stops)} stop")
    bounds = np.stack([starts, stops], axis=1).ravel()
    if bounds.size and (bounds[0] < 0 or bounds[-1] > num_tokens or (np.diff(bounds) <= 0).any()):
        raise CorruptPartError(f"response spans are not ascending within {num_tokens} tokens")
    edges = np.zeros(num_tokens + 1, np.int8)
    edges[starts] = 1
    edges[stops] = -1
    return np.cumsum(edges[:-1], dtype=np.int8).astype(bool)
