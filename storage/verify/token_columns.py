"""The columns of a tokens table, checked whole: spans, ids and counts of all rows at once."""

# pyarrow makes its compute functions when it is imported:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.encoding.arrow_rows import decode_keys
from storage.encoding.parquet_schema import whole_column
from storage.identity import Identity


def check_tokens(table: pa.Table, identity: Identity, first: int = 0) -> NDArray[np.int64]:
    """Response tokens of each row of a tokens table, all rows of which pass the checks of arrow_rows.decode_tokens_row.

    Images are checked by count alone. `first` is the number of the first row, for messages. Errors: ValueError.
    """
    ids, num_tokens = _list(table, "token_ids")
    starts, num_starts = _list(table, "response_starts")
    stops, num_stops = _list(table, "response_stops")
    row_of_id, row_of_span = (np.repeat(np.arange(len(count)), count) for count in (num_tokens, num_starts))

    def check(good: NDArray[np.bool_], problem: str, rows: NDArray[np.int64] | None = None) -> None:
        if not good.all():
            at = int(np.argmin(good))
            raise ValueError(f"row {first + (at if rows is None else int(rows[at]))}: {problem}")

    check(num_starts == num_stops, "as many response spans must start as stop")
    inside = (starts >= 0) & (stops > starts) & (stops <= num_tokens[row_of_span])
    inside[1:] &= (row_of_span[1:] != row_of_span[:-1]) | (starts[1:] > stops[:-1])
    check(inside, "response spans are not ascending within the tokens", row_of_span)
    placeholders = ids == identity.image_token_id
    known = (ids >= 0) & (ids < identity.vocab_size) | placeholders
    check(known, f"a token id is outside 0..{identity.vocab_size - 1}", row_of_id)
    check(table["num_tokens"].to_numpy() == num_tokens, "num_tokens is not the number of token ids")
    lengths = (stops - starts).astype(np.float64)  # which bincount sums exactly below 2^53
    num_response = np.bincount(row_of_span, lengths, len(num_starts)).astype(np.int64)
    check(table["num_response_tokens"].to_numpy() == num_response, "num_response_tokens is not what the spans hold")
    num_images = np.bincount(row_of_id[placeholders], minlength=len(num_tokens))
    for name in ("image_paths", "image_sha256s", "image_visual_tokens", "image_keys"):
        check(_list(table, name)[1] == num_images, f"{name} has not one value for each image placeholder")
    _check_keys(table)
    return num_response


def _check_keys(table: pa.Table) -> None:
    """Raises the errors of decode_keys, which is left the rows that are not plain samples of whole rows."""
    is_whole = pc.and_(pc.equal(table["half"], ""), pc.equal(table["copy"], 0))
    is_plain = pc.and_(pc.equal(table["row_id"], table["sample_id"]), pc.greater_equal(table["source"], 0))
    decode_keys(table.filter(pc.invert(pc.and_(is_whole, is_plain))))


def _list(table: pa.Table, name: str) -> tuple[NDArray, NDArray[np.int64]]:
    """All values of a list column (of texts: none of them), and how many each row has."""
    lists = whole_column(table, name)
    offsets = lists.offsets.to_numpy()
    texts = pa.types.is_string(lists.type.value_type)
    values = np.zeros(0) if texts else lists.values.to_numpy()[offsets[0] : offsets[-1]]
    return values, np.diff(offsets).astype(np.int64)
