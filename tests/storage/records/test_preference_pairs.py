import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from storage.encoding.parquet_schema import KEY_COLUMNS, SCHEMAS
from storage.records.preference_pairs import check_pairs, check_sequence, find_pair_positions
from storage.records.records import SequenceLogprob
from storage.records.sample_key import SampleKey
from tests.storage.family_cache import make_family_part

TEXT, _, SHARED, CHOSEN, REJECTED = make_family_part(0).tokens


def make_key_table(rows):
    return pa.Table.from_pylist(
        [dict(zip(KEY_COLUMNS, row, strict=True)) for row in rows],
        pa.schema([SCHEMAS["tokens"].field(name) for name in KEY_COLUMNS]),
    )


def test_pairs_are_found_by_their_keys():
    rows = [
        ("b", "rejected", 0, 0),
        ("a", "chosen", 1, 2),
        ("c", "", 0, 0),
        ("b", "chosen", 0, 0),
        ("lone", "chosen", 0, 0),
        ("a", "rejected", 0, 2),  # of the row's first copy
        ("a", "rejected", 1, 2),
        ("lone", "rejected", 0, 1),  # of another source
        ("d#chosen", "", 0, 0),  # rows with such ids of their own
        ("d#rejected", "", 0, 0),
    ]
    table = make_key_table(rows)
    assert find_pair_positions(table).tolist() == [[1, 6], [3, 0]]
    assert find_pair_positions(pa.concat_tables([table[:2], table[2:]])).tolist() == [[1, 6], [3, 0]]
    assert find_pair_positions(make_key_table([])).shape == (0, 2)


def test_good_pairs_pass_beside_ordinary_samples():
    alike = dataclasses.replace(TEXT, key=SampleKey("alone#chosen"))
    check_pairs([TEXT, CHOSEN, SHARED, REJECTED, alike])
    check_pairs([])


def test_half_a_pair_is_refused():
    with pytest.raises(ValueError, match="sample 0-pair#chosen: its part holds no 0-pair#rejected"):
        check_pairs([CHOSEN, TEXT])
    with pytest.raises(ValueError, match="sample 0-pair#rejected: its part holds no 0-pair#chosen"):
        check_pairs([REJECTED])


def test_halves_with_other_prompts_or_images_are_refused():
    ids = CHOSEN.token_ids.copy()
    ids[2] += 1
    for changed in ({"token_ids": ids}, {"images": SHARED.images}, {"response_mask": np.zeros(6, bool)}):
        with pytest.raises(ValueError, match="its prompt or images differ"):
            check_pairs([dataclasses.replace(CHOSEN, **changed), REJECTED])


@pytest.mark.parametrize(
    ("logprob", "num_tokens", "message"),
    [
        (-1.0, 3, "over 3 tokens for 2"),
        (0.1, 2, "expected at most 0"),
        (float("nan"), 2, "logprob is nan"),
        (float("-inf"), 2, "logprob is -inf"),
        (-1e39, 2, "logprob is -1e"),
    ],
)
def test_impossible_sequence_logprobs_are_refused(logprob, num_tokens, message):
    check_sequence(SequenceLogprob(-1.0, 2), CHOSEN)
    check_sequence(SequenceLogprob(0.0, 2), CHOSEN)
    with pytest.raises(ValueError, match=message):
        check_sequence(SequenceLogprob(logprob, num_tokens), CHOSEN)
