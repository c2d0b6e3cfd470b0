from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from storage.errors import ConfigError
from storage.reader.cache import Cache
from student_train.config import StageSection
from student_train.data.sample_filter import COLUMNS, filter_samples, read_sample_columns
from student_train.training.stage_data import prepare_stage_data
from tests.student_train.caches import make_cache


@pytest.fixture(scope="module")
def opened(cache: Path) -> Cache:
    return Cache.open(cache)


def test_columns_agree_with_the_records(opened: Cache) -> None:
    table = read_sample_columns(opened, set(COLUMNS) - {"sequence_logprob"}).to_pylist()
    assert len(table) == opened.num_samples == 48
    for index in (0, 7, 24, 47):
        record, row = opened.read(index), table[index]
        assert record.response is not None
        assert record.response.label_logprob is not None
        assert (row["sample_id"], row["split"]) == (record.tokens.sample_id, record.tokens.split)
        assert row["num_tokens"] == len(record.tokens.token_ids)
        assert row["num_response_tokens"] == record.response.num_rows
        assert (row["num_images"], row["num_visual_tokens"]) == (1, 16)
        assert row["entropy_mean"] == pytest.approx(record.response.entropy.mean(), rel=1e-5)
        assert row["label_logprob_min"] == record.response.label_logprob.min()
        assert row["tail_mass_max"] == record.response.tail_mass.max()


def test_all_conditions_must_hold(opened: Cache) -> None:
    everything = np.arange(opened.num_samples)
    kept = filter_samples(opened, everything, [("category", "in", ("left", "caption")), ("split", "!=", "test")])
    expected = [n for n in range(48) if opened.categories[n] != "right" and opened.splits[n] == "train"]
    assert kept.tolist() == expected
    assert len(expected) == 16
    middle = float(np.median(opened.num_response_rows))
    longer = filter_samples(opened, everything[::-1].copy(), [("num_response_tokens", ">", middle)])
    assert longer.tolist() == [n for n in reversed(range(48)) if opened.num_response_rows[n] > middle]
    assert filter_samples(opened, everything, []).tolist() == everything.tolist()


def test_a_sample_without_rows_meets_no_condition_on_rows(checkpoint: Path, tmp_path: Path) -> None:
    from tests.student_train import caches

    path = caches.make_cache(tmp_path, checkpoint, num_samples=4, families=("response", "sequence"))
    opened = Cache.open(path)
    first = read_sample_columns(opened, {"sequence_logprob"})["sequence_logprob"].to_pylist()
    assert filter_samples(opened, np.arange(8), [("sequence_logprob", "<=", first[3])]).tolist() == [
        n for n in range(8) if first[n] <= first[3]
    ]

    class Empty:
        folder = "empty"
        families = ("tokens", "response")

        def tables(self, _family: str, columns: list[str]) -> list:
            import pyarrow as pa

            lists = pa.array([[1.0, 3.0], [], [2.0]], pa.list_(pa.float32()))
            return [pa.table({columns[0]: lists}), pa.table({columns[0]: lists.slice(1)})]

    columns = read_sample_columns(Empty(), {"entropy_mean", "entropy_max"})  # pyright: ignore[reportArgumentType]
    assert columns["entropy_mean"].to_pylist() == [2.0, None, 2.0, None, 2.0]
    assert columns["entropy_max"].to_pylist() == [3.0, None, 2.0, None, 2.0]
    kept = filter_samples(Empty(), np.arange(5), [("entropy_mean", "!=", 7)])  # pyright: ignore[reportArgumentType]
    assert kept.tolist() == [0, 2, 4]
    kept = filter_samples(Empty(), np.arange(5), [("entropy_max", "not in", (3,))])  # pyright: ignore[reportArgumentType]
    assert kept.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (["entropy", "<", 2], "there is no column 'entropy'; take one of sample_id, .*entropy_mean"),
        (["num_images", "==", "1"], "'1' is not a number"),
        (["category", "==", 3], "3 is not text"),
        (["category", "in", "left"], "expected a list"),
        (["num_images", "<", [1, 2]], "expected one value"),
        (["category", "in", []], "the list is empty"),
        (["num_tokens", "<", 10**30], "does not fit into 64 bits"),
        (["num_images", "like", 1], "filter"),
        (["num_images", "__import__('os')", 1], "filter"),
    ],
)
def test_an_invalid_condition_is_refused(checkpoint: Path, condition: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StageSection.model_validate({"init": str(checkpoint), "steps": 1, "filter": [condition]})


def test_a_stage_trains_on_the_samples_that_its_filter_keeps(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    def stage(*conditions: list, **fields: object) -> StageSection:
        document = {"init": str(checkpoint), "steps": 1, "filter": conditions, **fields}
        return StageSection.model_validate(document)

    table = prepare_stage_data(stage(["category", "==", "left"], ["num_images", "==", 1]), str(cache)).table
    assert len(table) == 8
    with pytest.raises(ConfigError, match="no sample of the splits train meets the filter num_images > 1"):
        prepare_stage_data(stage(["num_images", ">", 1]), str(cache))
    bare = make_cache(tmp_path, checkpoint, num_samples=2, families=("visual",))
    with pytest.raises(ConfigError, match="filter reads entropy_mean of the family response"):
        prepare_stage_data(stage(["entropy_mean", "<", 2]), str(bare))
