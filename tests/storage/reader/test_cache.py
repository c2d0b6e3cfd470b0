import pickle
from collections import Counter

import numpy as np
import pytest

from storage.errors import CacheError, CorruptPartError
from storage.reader.cache import Cache, find_first_sample_with_images, read_identity
from storage.records.records import PartRecords
from storage.records.sparse_rows import SparseRows
from storage.writer.cache_writer import CacheWriter
from tests.storage.synthetic_cache import FAMILIES, SAMPLES_PER_PART, make_identity, make_part, write_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    write_cache(path, num_parts=3)
    return path


def read_response(cache, index) -> SparseRows:
    rows = cache.read(index).response
    assert rows is not None
    return rows


def read_whole_part(part):
    records = make_part(part)
    assert records.response is not None
    assert records.visual is not None
    assert records.relation is not None
    return records.tokens, records.response, records.visual, records.relation


def assert_rows_match(got, rows):
    np.testing.assert_array_equal(got.ids, rows.ids)
    np.testing.assert_array_equal(got.num_exact, rows.num_exact)
    for name in ("tail_mass", "entropy", "log_sum_exp", "label_logprob"):
        if getattr(rows, name) is None:
            assert getattr(got, name) is None
        else:
            np.testing.assert_array_equal(getattr(got, name), getattr(rows, name))
    np.testing.assert_allclose(got.logprobs, rows.logprobs, rtol=2**-10, atol=2e-2)


def test_what_is_read_is_what_was_written(folder):
    cache = Cache.open(folder)
    for part in range(3):
        all_tokens, response, visual, relation = read_whole_part(part)
        for row, tokens in enumerate(all_tokens):
            index = cache.index_of(tokens.sample_id)
            assert index == part * SAMPLES_PER_PART + row
            got = cache.read(index)
            np.testing.assert_array_equal(got.tokens.token_ids, tokens.token_ids)
            np.testing.assert_array_equal(got.tokens.response_mask, tokens.response_mask)
            assert got.tokens.token_ids.dtype == np.int32
            assert got.tokens.response_mask.dtype == bool
            for name in ("sample_id", "split", "category", "images"):
                assert getattr(got.tokens, name) == getattr(tokens, name)
            assert_rows_match(got.response, response[row])
            assert set(got.visual) == set(got.relation) == {image.key for image in tokens.images}
            for key, rows in got.visual.items():
                assert_rows_match(rows, visual[key])
            for key, matrix in got.relation.items():
                assert matrix.norm == pytest.approx(relation[key].norm)
                np.testing.assert_allclose(matrix.values, relation[key].values, rtol=2e-3)


def test_the_index_says_what_the_records_say(folder):
    cache = Cache.open(folder)
    assert cache.sealed
    assert cache.families == ("tokens", *FAMILIES)
    assert cache.num_samples == len(cache.sample_ids) == 3 * SAMPLES_PER_PART
    for index in range(cache.num_samples):
        tokens = cache.read(index).tokens
        assert cache.sample_ids[index] == tokens.sample_id
        assert cache.splits[index] == tokens.split
        assert cache.categories[index] == tokens.category
        assert cache.num_response_rows[index] == tokens.num_response_tokens
        assert cache.num_images[index] == len(tokens.images)
        assert all(cache.count_samples_showing(image.key) >= 1 for image in tokens.images)
    assert cache.num_response_rows.dtype == np.int32
    assert [error.sample_id for error in cache.errors] == ["broken-0", "broken-1", "broken-2"]


def test_statistics_add_up(folder):
    statistics = Cache.open(folder).statistics()
    parts = [read_whole_part(part) for part in range(3)]
    rows = {
        "response": sum(rows.num_rows for _, response, _, _ in parts for rows in response),
        "visual": sum(rows.num_rows for _, _, visual, _ in parts for rows in visual.values()),
    }
    assert statistics["num_rows"] == rows
    assert statistics["num_samples"] == 3 * SAMPLES_PER_PART
    assert statistics["num_images"] == sum(len(visual) for _, _, visual, _ in parts)
    assert statistics["num_errors"] == 3
    by_family = {
        family: sum(file.stat().st_size for file in (folder / family).iterdir()) for family in ("tokens", *FAMILIES)
    }
    assert statistics["bytes_by_family"] == by_family
    assert statistics["bytes"] == sum(by_family.values())
    row_bytes = by_family["response"] + by_family["visual"]
    assert statistics["bytes_per_row"] == pytest.approx(row_bytes / sum(rows.values()))


def test_only_the_families_asked_for_are_read(folder, tmp_path):
    record = Cache.open(folder, families=("visual",)).read(0)
    assert record.response is None
    assert record.visual
    assert not record.relation
    assert Cache.open(folder, families=()).read(0).visual == {}


def test_a_cache_of_tokens_alone_works(tmp_path):
    write_cache(tmp_path, families=())
    cache = Cache.open(tmp_path)
    assert cache.families == ("tokens",)
    assert cache.read(3).response is None
    assert cache.statistics()["bytes_per_row"] == 0
    with pytest.raises(CacheError, match="holds tokens, not response"):
        Cache.open(tmp_path, families=("response",))


def test_where_there_is_no_cache_the_message_says_so(tmp_path):
    with pytest.raises(CacheError, match=r"no cache is here .*run the dump"):
        Cache.open(tmp_path / "nowhere")


def test_a_growing_cache_can_be_read(tmp_path):
    writer = CacheWriter.open(tmp_path, make_identity(num_parts=3), FAMILIES)
    assert Cache.open(tmp_path).num_samples == 0
    writer.write_part(2, make_part(2))
    cache = Cache.open(tmp_path)
    assert not cache.sealed
    assert cache.sample_ids[0] == "sample-2-0"
    assert cache.read(5).tokens.sample_id == "sample-2-5"


@pytest.mark.parametrize("index", [-1, 3 * SAMPLES_PER_PART])
def test_an_index_out_of_bounds_is_refused(folder, index):
    with pytest.raises(IndexError):
        Cache.open(folder).read(index)


def test_an_unknown_sample_is_a_key_error(folder):
    with pytest.raises(KeyError):
        Cache.open(folder).index_of("nobody")


def test_a_cache_object_survives_pickling(folder):
    cache = Cache.open(folder)
    cache.read(0)
    copy = pickle.loads(pickle.dumps(cache))
    assert read_response(copy, 7).equals(read_response(cache, 7))


def test_memory_for_row_groups_is_bounded(folder):
    bounded = Cache.open(folder, max_bytes=1)
    plain = Cache.open(folder)
    order = np.random.default_rng(0).permutation(bounded.num_samples)
    for index in order:
        assert read_response(bounded, int(index)).equals(read_response(plain, int(index)))
    assert plain.read(0).tokens.token_ids.flags.writeable  # a copy, which holds no row group
    assert len(bounded._row_groups._entries) == 1
    kinds = Counter(what if isinstance(what, str) else "group" for _, what in plain._row_groups._entries)
    assert kinds == {"group": 3 * 4, "id groups": 3 * 2, "image_key": 3 * 2}  # by files that have such a thing
    assert plain._row_groups.held_bytes == sum(num_bytes for _, num_bytes in plain._row_groups._entries.values())


def test_a_removed_commit_of_a_sealed_cache_is_named(tmp_path):
    write_cache(tmp_path)
    (tmp_path / "commits" / "part-00001.json").unlink()
    with pytest.raises(CorruptPartError, match=r"part-00001.json: is missing, but the manifest names it"):
        Cache.open(tmp_path)


def test_a_file_of_other_bytes_is_refused_when_first_touched(tmp_path):
    write_cache(tmp_path)
    victim = next((tmp_path / "relation").glob("part-00000*"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert Cache.open(tmp_path, families=("response",)).read(0)
    with pytest.raises(CorruptPartError, match=f"{victim.name}: sha256 is .*, its commit says"):
        Cache.open(tmp_path).read(0)


def test_other_programs_read_the_plain_columns(folder):
    duckdb = pytest.importorskip("duckdb")
    query = (
        f"select r.sample_id, len(t.token_ids), list_sum(r.entropy) from '{folder}/response/*.parquet' r "
        f"join '{folder}/tokens/*.parquet' t using (sample_id) where t.split = 'test' order by 1"
    )
    cache = Cache.open(folder)
    rows = duckdb.sql(query).fetchall()
    assert [row[0] for row in rows] == [f"sample-{part}-0" for part in range(3)]
    for sample_id, num_tokens, entropy in rows:
        index = cache.index_of(sample_id)
        assert num_tokens == len(cache.read(index).tokens.token_ids)
        assert entropy == pytest.approx(float(read_response(cache, index).entropy.sum()), rel=1e-5)


def test_plain_columns_come_part_by_part_in_the_order_of_the_samples(folder):
    cache = Cache.open(folder)
    tables = list(cache.tables("response", ["sample_id", "entropy"]))
    assert len(tables) == 3
    assert [name for table in tables for name in table["sample_id"].to_pylist()] == cache.sample_ids
    entropies = [values for table in tables for values in table["entropy"].to_pylist()]
    assert entropies == [read_response(cache, index).entropy.tolist() for index in range(cache.num_samples)]


def test_the_identity_is_read_from_cache_json_alone(tmp_path):
    write_cache(tmp_path, num_parts=1)
    expected = Cache.open(tmp_path).identity
    for file in tmp_path.rglob("part-*"):
        file.unlink()
    assert read_identity(tmp_path) == expected
    with pytest.raises(CacheError, match="no cache is here"):
        read_identity(tmp_path / "nowhere")


def test_the_first_sample_with_images_is_of_the_splits_asked_for(tmp_path):
    tokens = make_part(0).tokens
    text, pair = tokens[2], tokens[3]
    assert (len(text.images), len(pair.images), text.split) == (0, 2, "train")
    writer = CacheWriter.open(tmp_path, make_identity(num_parts=2), ())
    writer.write_part(0, PartRecords(tokens=[text]))
    assert find_first_sample_with_images(tmp_path, ("train",)) is None
    writer.write_part(1, PartRecords(tokens=[tokens[0], pair]))
    found = find_first_sample_with_images(tmp_path, ("train", "other"))
    assert found is not None
    assert (found.sample_id, found.images) == (pair.sample_id, pair.images)
    assert find_first_sample_with_images(tmp_path, ("other",)) is None
