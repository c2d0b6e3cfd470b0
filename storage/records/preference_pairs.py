"""Preference pairs: two samples `<id>#chosen` and `<id>#rejected` of one part, with one prompt.

Both are ordinary samples, so other families and losses on single answers (KTO) need no special case;
losses on pairs (DPO) join the two by id.
"""

# pyarrow makes its compute functions when it is imported:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.records.records import SequenceLogprob, TokensRecord
from storage.records.sparse_rows import LOGPROB_TOLERANCE

CHOSEN, REJECTED = "#chosen", "#rejected"


@dataclass(frozen=True)
class PreferencePair:
    """A preference pair: the positions of its chosen and rejected sample in a cache."""

    pair_id: str
    chosen: int
    rejected: int


def find_pair_positions(sample_ids: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Returns (p, 2) the chosen and rejected positions of each pair, in the order of chosen samples.

    A sample without its other half is left out.
    """
    chosen, rejected = (
        np.flatnonzero(pc.ends_with(sample_ids, half).to_numpy(zero_copy_only=False)) for half in (CHOSEN, REJECTED)
    )
    names = pc.utf8_slice_codeunits(sample_ids.take(pa.array(chosen)), 0, -len(CHOSEN))
    others = pc.utf8_slice_codeunits(sample_ids.take(pa.array(rejected)), 0, -len(REJECTED))
    matches = pc.index_in(names, value_set=others)
    is_whole = matches.is_valid().to_numpy(zero_copy_only=False)
    partners = rejected[matches.drop_null().to_numpy().astype(np.int64)]
    return np.stack([chosen[is_whole], partners], axis=1).astype(np.int64)


def check_pairs(records: Iterable[TokensRecord]) -> None:
    """Raises ValueError unless both samples of each pair are in the part, with the same prompt and images."""
    halves = {record.sample_id: record for record in records if record.sample_id.endswith((CHOSEN, REJECTED))}
    for sample_id, record in halves.items():
        other_id = get_other_half_id(sample_id)
        other = halves.get(other_id)
        if other is None:
            raise ValueError(f"sample {sample_id}: its part holds no {other_id}; leave both out, or keep both")
        if record.images != other.images or not np.array_equal(_select_prompt(record), _select_prompt(other)):
            raise ValueError(f"sample {sample_id}: its prompt or images differ from those of {other_id}")


def check_sequence(sequence: SequenceLogprob, record: TokensRecord) -> None:
    """Raises ValueError unless a sequence logprob is valid for a sample's response."""
    place, count = f"sample {record.sample_id}", record.num_response_tokens
    if sequence.num_tokens != count:
        raise ValueError(f"{place}: a sequence logprob over {sequence.num_tokens} tokens for {count} response tokens")
    logprob = sequence.logprob
    if not -float(np.finfo(np.float32).max) <= logprob <= LOGPROB_TOLERANCE * count:  # nor may it be NaN
        raise ValueError(f"{place}: its sequence logprob is {logprob}, expected at most 0")


def get_other_half_id(sample_id: str) -> str:
    """Returns the id of the other sample of a pair."""
    if sample_id.endswith(CHOSEN):
        return sample_id.removesuffix(CHOSEN) + REJECTED
    return sample_id.removesuffix(REJECTED) + CHOSEN


def _select_prompt(record: TokensRecord) -> np.ndarray:
    """Returns the token ids before the first response token."""
    first = int(np.argmax(record.response_mask)) if record.response_mask.any() else len(record.token_ids)
    return record.token_ids[:first]
