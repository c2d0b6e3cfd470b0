"""The files of the families response and visual: scalars as plain columns, entries as a block a row group.

A part's file has one table of id groups, made of all its rows, in the Parquet key-value metadata.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard
from numpy.typing import NDArray

from storage.encoding.id_groups import IdGroups
from storage.encoding.parquet_schema import RowGroups, whole_column
from storage.encoding.row_block import decode_block, encode_block
from storage.encoding.row_block_check import check_block
from storage.encoding.row_block_header import read_header
from storage.errors import CorruptPartError
from storage.identity import (
    Identity,
    stored_draw_sets,
    stored_rounding_kl,
    stored_seed,
    stored_tau,
    stored_temperatures,
)
from storage.records.sparse_rows import SparseRows, check_scalars

ROWS_PER_GROUP = 4096  # distribution rows: some milliseconds to decode
ID_GROUPS_KEY = "stillhouse.id_groups"
SCALAR_BITS = 10  # of a rounded scalar's mantissa, as float16 has: it is within a factor 1 +- 2^-11

Columns = Mapping[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """How a family's rows are kept."""

    vocab_size: int
    tau: float  # the weight of one draw; 0 where nothing is sampled
    rounding_kl: float  # nats a row, on average; 0 where probabilities and scalars are float32
    num_temperatures: int  # besides 1
    num_sets: int = 1  # of draws
    seed: int = 0  # of draws and of rounding
    family: str = "response"

    @staticmethod
    def of(identity: Identity, family: str) -> RowFormat:
        """What a cache's identity says of a family."""
        return RowFormat(
            vocab_size=identity.vocab_size,
            tau=stored_tau(identity, family),
            rounding_kl=stored_rounding_kl(identity, family),
            num_temperatures=len(stored_temperatures(identity, family)),
            num_sets=stored_draw_sets(identity, family),
            seed=stored_seed(identity, family),
            family=family,
        )


def encode_groups(keys: Sequence[Columns], rows: Sequence[SparseRows], kept: RowFormat) -> RowGroups:
    """Row groups of some samples or images, each with its `keys`. ValueError for rows that a cache may not hold."""
    parts = [(start, stop, SparseRows.concatenate(rows[start:stop])) for start, stop in _cuts(rows)]
    counts = np.zeros(kept.vocab_size, np.int64)
    for start, stop, together in parts:
        _validate(together, rows[start:stop], kept)
        for each in (together, *together.other_sets):
            counts += np.bincount(each.ids, minlength=kept.vocab_size)
    id_groups = IdGroups.of_counts(counts)
    groups, errors = [], []
    for start, stop, together in parts:
        seed = _rounding_seed(kept, keys[start])
        encoded = encode_block(together, id_groups, tau=kept.tau, rounding_kl=kept.rounding_kl, seed=seed)
        errors += encoded.errors.tolist()
        blocks = [encoded.block] + [b""] * (stop - start - 1)
        scalars = _scalars(together, [each.num_rows for each in rows[start:stop]], kept)
        groups.append(
            [
                {**key, **values, "block": block}
                for key, values, block in zip(keys[start:stop], scalars, blocks, strict=True)
            ]
        )
    table = zstandard.ZstdCompressor(level=9).compress(id_groups.table.tobytes())
    return RowGroups(groups, {ID_GROUPS_KEY: base64.b64encode(table).decode("ascii")}, errors)


def decode_id_groups(metadata: Mapping[bytes, bytes] | None, vocab_size: int) -> IdGroups:
    """The id groups of a file, from its key-value metadata. Errors: CorruptPartError."""
    text = (metadata or {}).get(ID_GROUPS_KEY.encode())
    if text is None:
        raise CorruptPartError(f"the file has no table of id groups in its metadata ({ID_GROUPS_KEY})")
    try:
        packed = base64.b64decode(text, validate=True)
        if zstandard.frame_content_size(packed) != vocab_size:
            raise CorruptPartError(f"the table of id groups is not of {vocab_size} ids")
        return IdGroups.parse(zstandard.ZstdDecompressor().decompress(packed), vocab_size)
    except (zstandard.ZstdError, ValueError, binascii.Error) as error:
        raise CorruptPartError(f"the table of id groups: {error}") from error


def decode_group(
    table: pa.Table, id_groups: IdGroups, num_temperatures: int, *, num_sets: int = 1, draw_set: int = 0
) -> tuple[SparseRows, NDArray[np.int64]]:
    """All rows of a row group, and where each sample's or image's start (the total last).

    `draw_set` (modulo `num_sets`) says which draws of their tails.
    Errors: CorruptPartError where columns, counts and block disagree.
    """
    block = _block_of(whole_column(table, "block"), 0, table.num_rows, num_sets)
    counts, scalars = _scalars_of(table, num_temperatures)
    own: dict[str, Any] = {name: values if values is None else values.copy() for name, values in scalars.items()}
    rows = decode_block(block, id_groups, **own, draw_set=draw_set)
    return rows, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def check_groups(table: pa.Table, sizes: Sequence[int], id_groups: IdGroups, kept: RowFormat) -> NDArray[np.int64]:
    """How many rows each sample or image of some row groups has, all of which are found to be good; none is made.

    `sizes` are the samples or images of each group. Errors: CorruptPartError, ValueError.
    """
    counts, scalars = _scalars_of(table, kept.num_temperatures)
    check_scalars(**scalars)
    blocks, tail_mass, start, row = whole_column(table, "block"), scalars["tail_mass"], 0, 0
    for size in sizes:
        block = _block_of(blocks, start, start + size, kept.num_sets)
        stop = row + int(counts[start : start + size].sum())
        check_block(block, id_groups, tail_mass=tail_mass[row:stop], tau=kept.tau)
        start, row = start + size, stop
    return counts


def _block_of(blocks: pa.BinaryArray, start: int, stop: int, num_sets: int) -> memoryview:
    """The block of a row group, which is that of its first sample or image, start : stop being all of them."""
    if start == stop:
        raise CorruptPartError("a row group is empty, so it has no block")
    block = memoryview(blocks[start].as_buffer())
    ends = np.frombuffer(blocks.buffers()[1], np.int32)[blocks.offset :]
    if ends[stop] > ends[start + 1]:
        raise CorruptPartError("a row group has more than one block")
    if (found := read_header(block).num_sets) != num_sets:
        raise CorruptPartError(f"the block has {found} sets of draws, the cache {num_sets}")
    return block


def _scalars_of(table: pa.Table, num_temperatures: int) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """Rows by sample or image, and the scalars of all rows, which are not copied."""
    counts = table["num_rows"].to_numpy().astype(np.int64)
    if (counts < 0).any():
        raise CorruptPartError("num_rows is negative")
    log_sum_exp = _values(table, "log_sum_exp", counts * num_temperatures)
    has_labels = "label_logprob" in table.column_names
    return counts, {
        "tail_mass": _values(table, "tail_mass", counts),
        "entropy": _values(table, "entropy", counts),
        "log_sum_exp": log_sum_exp.reshape(int(counts.sum()), num_temperatures),
        "label_logprob": _values(table, "label_logprob", counts) if has_labels else None,
    }


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest float32 with SCALAR_BITS bits of mantissa: the other bits are zero, and compress to nothing."""
    spare = np.uint32(23 - SCALAR_BITS)
    bits = values.view(np.uint32)
    half = np.uint32((1 << int(spare) - 1) - 1) + ((bits >> spare) & np.uint32(1))
    return ((bits + half) >> spare << spare).view(np.float32)


def _rounding_seed(kept: RowFormat, keys: Columns) -> int:
    """Of a row group's rounding: of the selection's seed, the family, and the group's first sample or image."""
    first = next(iter(keys.values()))
    digest = hashlib.sha256(f"stillhouse rounding 1\0{kept.seed}\0{kept.family}\0{first}".encode()).digest()
    return int.from_bytes(digest[:16], "little")


def _validate(together: SparseRows, rows: Sequence[SparseRows], kept: RowFormat) -> None:
    """ValueError for rows that a cache may not hold, of the first sample that has any.

    They are looked at all at once; what joining them would hide is looked at first.
    """
    for each in rows:
        if each.offsets[0] != 0 or each.offsets[-1] != len(each.ids) or len(each.num_exact) != each.num_rows:
            each.validate(kept.vocab_size)
    if together.log_sum_exp.shape[1] != kept.num_temperatures:
        raise ValueError(f"rows have {together.log_sum_exp.shape[1]} temperatures, the cache {kept.num_temperatures}")
    if len(together.other_sets) != kept.num_sets - 1:
        raise ValueError(f"rows have {len(together.other_sets) + 1} sets of draws, the cache {kept.num_sets}")
    try:
        together.validate(kept.vocab_size)
    except ValueError:
        for each in rows:  # whose own row numbers say more
            each.validate(kept.vocab_size)
        raise


def _scalars(together: SparseRows, counts: Sequence[int], kept: RowFormat) -> list[Columns]:
    """The scalar columns of samples of so many rows each."""
    scalars = {"entropy": together.entropy, "tail_mass": together.tail_mass, "log_sum_exp": together.log_sum_exp}
    if together.label_logprob is not None:
        scalars["label_logprob"] = together.label_logprob
    if kept.rounding_kl > 0:
        scalars = {name: rounded(values) for name, values in scalars.items()}
        below_one = np.float32(1 - 2.0 ** -(SCALAR_BITS + 1))
        below = (together.num_exact > 0) & (scalars["tail_mass"] >= 1)
        scalars["tail_mass"] = np.where(below, below_one, scalars["tail_mass"])
    stops = np.cumsum(counts).tolist()
    return [
        {"num_rows": count, **{name: values[stop - count : stop].ravel() for name, values in scalars.items()}}
        for count, stop in zip(counts, stops, strict=True)
    ]


def _cuts(rows: Sequence[SparseRows]) -> list[tuple[int, int]]:
    """Ranges of samples whose rows together are at most ROWS_PER_GROUP, or one sample."""
    cuts, start, size = [], 0, 0
    for position, each in enumerate(rows):
        if position > start and size + each.num_rows > ROWS_PER_GROUP:
            cuts.append((start, position))
            start, size = position, 0
        size += each.num_rows
    return [*cuts, (start, len(rows))] if start < len(rows) else cuts


def _values(table: pa.Table, name: str, counts: NDArray[np.int64]) -> NDArray[np.float32]:
    lists = whole_column(table, name)
    offsets = lists.offsets.to_numpy()
    if not np.array_equal(np.diff(offsets), counts):
        raise CorruptPartError(f"{name} has other lengths than num_rows says")
    return lists.values.to_numpy()[offsets[0] : offsets[-1]]
