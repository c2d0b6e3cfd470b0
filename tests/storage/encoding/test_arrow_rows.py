import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from storage.encoding.arrow_rows import decode_tokens_row, encode_tokens_row
from storage.encoding.parquet_schema import SCHEMAS
from storage.records.records import TokensRecord
from storage.records.sample_key import SampleKey
from tests.storage.synthetic_cache import make_identity


@given(st.lists(st.booleans(), max_size=40), st.text(max_size=5))
def test_any_response_mask_comes_back(bits, sample_id):
    mask = np.array(bits, bool)
    record = TokensRecord(SampleKey(sample_id), "train", "", np.full(len(bits), 9, np.int32), mask)
    try:
        columns = {name: pa.array([value], SCHEMAS["tokens"].field(name).type) for name, value in make_table(record)}
    except UnicodeEncodeError:
        assert any("\ud800" <= letter <= "\udfff" for letter in sample_id)
        return
    got = decode_tokens_row(pa.table(columns, schema=SCHEMAS["tokens"]), 0, make_identity())
    np.testing.assert_array_equal(got.response_mask, mask)
    assert got.sample_id == sample_id
    assert columns["num_response_tokens"].to_pylist() == [sum(bits)]


def make_table(record):
    return encode_tokens_row(record).items()
