"""Which samples of a cache a stage trains on: conditions on the cache's plain columns, all of which must hold.

No payload is decoded: a column of samples comes from the files' plain columns, and one of response rows is the
mean, the least or the largest of a sample's rows. A sample without rows has no such number and meets no condition
on it. Conditions are data (column, comparison, value), never code; pyarrow compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.errors import ConfigError
from storage.reader.cache import Cache

Comparison = Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in"]
Scalar = bool | int | float | str
Condition = tuple[str, Comparison, Scalar | tuple[Scalar, ...]]

TEXTS = ("sample_id", "split", "category")
COUNTS = ("num_tokens", "num_response_tokens", "num_images", "num_visual_tokens")  # visual ones: of the teacher
_SUMMARIES: Mapping[str, Callable[[NDArray, NDArray, NDArray], NDArray]] = {
    "mean": lambda values, starts, counts: np.add.reduceat(values.astype(np.float64), starts) / counts,
    "min": lambda values, starts, _: np.minimum.reduceat(values, starts),
    "max": lambda values, starts, _: np.maximum.reduceat(values, starts),
}
OF_ROWS = {  # of a sample's response rows: (the column of the family response, the summary)
    f"{column}_{summary}": (column, summary)
    for column in ("entropy", "label_logprob", "tail_mass")
    for summary in _SUMMARIES
}
SEQUENCE = "sequence_logprob"  # of a whole answer
COLUMNS = (*TEXTS, *COUNTS, *OF_ROWS, SEQUENCE)


def check_condition(condition: Condition) -> None:
    """ValueError for a column that is not known, or a value that it cannot be compared with."""
    column, comparison, value = condition
    if column not in COLUMNS:
        raise ValueError(f"there is no column {column!r}; take one of {', '.join(COLUMNS)}")
    if isinstance(value, tuple) != (comparison in ("in", "not in")):
        expected = "a list" if comparison in ("in", "not in") else "one value"
        raise ValueError(f"{column} {comparison} {value!r}: expected {expected} to compare with")
    if value == ():
        raise ValueError(f"{column} {comparison} (): the list is empty; leave the condition out")
    kind = str if column in TEXTS else int | float
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, bool) or not isinstance(each, kind):
            expected = "text" if column in TEXTS else "a number"
            raise ValueError(f"{column} {comparison} {value!r}: {each!r} is not {expected}")
        if isinstance(each, int) and abs(each) >= 2**63:
            raise ValueError(f"{column} {comparison} {value!r}: {each} does not fit into 64 bits")


def filtered(cache: Cache, indices: NDArray[np.int64], conditions: Sequence[Condition]) -> NDArray[np.int64]:
    """Those of some samples that meet every condition, in their order. ConfigError: the cache lacks a column."""
    if not conditions:
        return indices
    table = sample_columns(cache, {column for column, _, _ in conditions}).take(indices)
    table = table.append_column("at", pa.array(indices)).drop_null()  # of which "not in" would hold
    return table.filter(pq.filters_to_expression(list(conditions)))["at"].to_numpy()


def sample_columns(cache: Cache, names: set[str]) -> pa.Table:
    """Some of COLUMNS, a row for each sample of a cache. ConfigError: the cache lacks the family of one."""
    columns = {
        "sample_id": lambda: cache.sample_ids.arrow,
        "split": lambda: cache.splits.arrow.cast(pa.string()),
        "category": lambda: cache.categories.arrow.cast(pa.string()),
        "num_tokens": lambda: _joined(cache, "tokens", "num_tokens"),
        "num_response_tokens": lambda: cache.num_response_rows,
        "num_images": lambda: cache.num_images,
        "num_visual_tokens": lambda: cache.num_visual_tokens,
        SEQUENCE: lambda: _joined(cache, "sequence", "logprob"),
    }
    found = {}
    for name in sorted(names):
        family = "response" if name in OF_ROWS else "sequence" if name == SEQUENCE else "tokens"
        if family not in cache.families:
            raise ConfigError(f"{cache.folder}: filter asks for {name}, which is of the family {family}; dump it first")
        found[name] = _of_rows(cache, *OF_ROWS[name]) if name in OF_ROWS else _column(columns[name]())
    return pa.table(found)


def _column(values: Any) -> pa.Array | pa.ChunkedArray:
    return pa.array(values) if isinstance(values, np.ndarray) else values


def _joined(cache: Cache, family: str, column: str) -> pa.Array:
    return pa.concat_arrays([chunk for table in cache.tables(family, [column]) for chunk in table[column].chunks])


def _of_rows(cache: Cache, column: str, summary: str) -> pa.Array:
    """A summary of each sample's list of rows; null where it has none."""
    lists = _joined(cache, "response", column)
    counts = np.diff(lists.offsets.to_numpy())
    some = counts > 0
    values = np.full(len(counts), np.nan)
    if some.any():
        starts = (lists.offsets.to_numpy()[:-1] - lists.offsets[0].as_py())[some]
        values[some] = _SUMMARIES[summary](lists.flatten().to_numpy(), starts, counts[some])
    return pa.array(values, mask=~some)
