"""Filters the samples of a cache by conditions on its plain columns, all of which must hold.

No payload is decoded: sample columns are read from the files' plain columns, and columns of response rows are
summarised by the mean, minimum or maximum of a sample's rows. A sample without rows has no such number and meets no
condition on it. Conditions are data (column, comparison, value), never code; pyarrow compares.
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

TEXT_COLUMNS = ("sample_id", "split", "category")
COUNT_COLUMNS = (
    "num_tokens",
    "num_response_tokens",
    "num_images",
    "num_visual_tokens",
)  # num_visual_tokens: the teacher's
_SUMMARIES: Mapping[str, Callable[[NDArray, NDArray, NDArray], NDArray]] = {
    "mean": lambda values, starts, counts: np.add.reduceat(values.astype(np.float64), starts) / counts,
    "min": lambda values, starts, _: np.minimum.reduceat(values, starts),
    "max": lambda values, starts, _: np.maximum.reduceat(values, starts),
}
ROW_SUMMARIES = {  # over a sample's response rows: (column of the family response, summary)
    f"{column}_{summary}": (column, summary)
    for column in ("entropy", "label_logprob", "tail_mass")
    for summary in _SUMMARIES
}
SEQUENCE_COLUMN = "sequence_logprob"  # of a whole response
COLUMNS = (*TEXT_COLUMNS, *COUNT_COLUMNS, *ROW_SUMMARIES, SEQUENCE_COLUMN)


def check_condition(condition: Condition) -> None:
    """Check that a condition's column exists and can be compared with its value. Errors: ValueError."""
    column, comparison, value = condition
    if column not in COLUMNS:
        raise ValueError(f"there is no column {column!r}; take one of {', '.join(COLUMNS)}")
    if isinstance(value, tuple) != (comparison in ("in", "not in")):
        expected = "a list" if comparison in ("in", "not in") else "one value"
        raise ValueError(f"{column} {comparison} {value!r}: expected {expected} to compare with")
    if value == ():
        raise ValueError(f"{column} {comparison} (): the list is empty; remove the condition")
    kind = str if column in TEXT_COLUMNS else int | float
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, bool) or not isinstance(each, kind):
            expected = "text" if column in TEXT_COLUMNS else "a number"
            raise ValueError(f"{column} {comparison} {value!r}: {each!r} is not {expected}")
        if isinstance(each, int) and abs(each) >= 2**63:
            raise ValueError(f"{column} {comparison} {value!r}: {each} does not fit into 64 bits")


def filter_samples(cache: Cache, indices: NDArray[np.int64], conditions: Sequence[Condition]) -> NDArray[np.int64]:
    """Return the given samples that meet every condition, in their order. ConfigError: the cache lacks a column."""
    if not conditions:
        return indices
    table = read_sample_columns(cache, {column for column, _, _ in conditions}).take(indices)
    table = table.append_column("at", pa.array(indices)).drop_null()  # for which "not in" would hold
    return table.filter(pq.filters_to_expression(list(conditions)))["at"].to_numpy()


def read_sample_columns(cache: Cache, names: set[str]) -> pa.Table:
    """Read some of COLUMNS, one row for each sample of a cache. ConfigError: the cache lacks a needed family."""
    columns = {
        "sample_id": lambda: cache.sample_ids.arrow,
        "split": lambda: cache.splits.arrow.cast(pa.string()),
        "category": lambda: cache.categories.arrow.cast(pa.string()),
        "num_tokens": lambda: _read_column(cache, "tokens", "num_tokens"),
        "num_response_tokens": lambda: cache.num_response_rows,
        "num_images": lambda: cache.num_images,
        "num_visual_tokens": lambda: cache.num_visual_tokens,
        SEQUENCE_COLUMN: lambda: _read_column(cache, "sequence", "logprob"),
    }
    arrays = {}
    for name in sorted(names):
        family = "response" if name in ROW_SUMMARIES else "sequence" if name == SEQUENCE_COLUMN else "tokens"
        if family not in cache.families:
            raise ConfigError(
                f"{cache.folder}: filter reads {name} of the family {family}, which this cache lacks; dump it first"
            )
        if name in ROW_SUMMARIES:
            arrays[name] = _summarize_rows(cache, *ROW_SUMMARIES[name])
        else:
            arrays[name] = _to_arrow(columns[name]())
    return pa.table(arrays)


def _to_arrow(values: Any) -> pa.Array | pa.ChunkedArray:
    return pa.array(values) if isinstance(values, np.ndarray) else values


def _read_column(cache: Cache, family: str, column: str) -> pa.Array:
    return pa.concat_arrays([chunk for table in cache.tables(family, [column]) for chunk in table[column].chunks])


def _summarize_rows(cache: Cache, column: str, summary: str) -> pa.Array:
    """Summarise each sample's list of rows; null for a sample without rows."""
    lists = _read_column(cache, "response", column)
    counts = np.diff(lists.offsets.to_numpy())
    some = counts > 0
    values = np.full(len(counts), np.nan)
    if some.any():
        starts = (lists.offsets.to_numpy()[:-1] - lists.offsets[0].as_py())[some]
        values[some] = _SUMMARIES[summary](lists.flatten().to_numpy(), starts, counts[some])
    return pa.array(values, mask=~some)
