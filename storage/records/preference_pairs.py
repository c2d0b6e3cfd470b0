"""Preference pairs: two samples of one part, the chosen and the rejected half of one row, with one prompt.

Both are ordinary samples, so other families and losses on single answers (KTO) need no special case;
losses on pairs (DPO) join the two by their keys.
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
from storage.records.sample_key import HALVES
from storage.records.sparse_rows import LOGPROB_TOLERANCE


@dataclass(frozen=True)
class PreferencePair:
    """A preference pair: the positions of its chosen and rejected sample in a cache."""

    pair_id: str  # that of the halves, without which half it is
    chosen: int
    rejected: int


def find_pair_positions(keys: pa.Table) -> NDArray[np.int64]:
    """Returns (p, 2) the chosen and rejected positions of each pair, in the order of chosen samples.

    `keys`: the KEY_COLUMNS of samples. A sample without its other half is left out.
    """
    positions = keys.append_column("position", pa.array(np.arange(len(keys))))
    halves = [positions.filter(pc.equal(keys["half"], half)) for half in HALVES]
    chosen, rejected = (table.select(["source", "row_id", "copy", "position"]) for table in halves)
    pairs = chosen.join(rejected, ["source", "row_id", "copy"], join_type="inner", right_suffix=" of rejected")
    found = np.stack([pairs["position"].to_numpy(), pairs["position of rejected"].to_numpy()], axis=1)
    return found[np.argsort(found[:, 0])]


def check_pairs(records: Iterable[TokensRecord]) -> None:
    """Raises ValueError unless both samples of each pair are in the part, with the same prompt and images."""
    halves = {record.key: record for record in records if record.key.half is not None}
    for key, record in halves.items():
        sample_id, other_id = key.sample_id, key.other_half.sample_id
        other = halves.get(key.other_half)
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


def _select_prompt(record: TokensRecord) -> np.ndarray:
    """Returns the token ids before the first response token."""
    first = int(np.argmax(record.response_mask)) if record.response_mask.any() else len(record.token_ids)
    return record.token_ids[:first]
