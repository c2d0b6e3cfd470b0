from __future__ import annotations

import errno
import pickle
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import ConfigError, StillhouseError
from storage.records.sample_key import HALVES, SampleKey
from teacher_dump.data.sample import Sample, Turn
from teacher_dump.data.sample_spool import SampleFile, SampleSubset

texts = st.text(max_size=20)
turns = st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), texts), max_size=3).map(tuple)
keys = st.builds(SampleKey, texts, st.sampled_from([None, *HALVES]), st.integers(0, 3), st.integers(0, 3))
samples = st.lists(
    st.builds(Sample, keys, texts, texts, st.lists(texts.map("/root/".__add__), max_size=2).map(tuple), turns),
    max_size=6,
)


@given(samples)
def test_samples_read_back_equal_those_written_with_shorter_paths(written: list[Sample]) -> None:
    read = SampleFile(iter(written))
    assert list(read) == written
    read.strip_path_prefix(len("/root/"))
    expected = [
        Sample(one.key, one.split, one.category, tuple(path.removeprefix("/root/") for path in one.images), one.turns)
        for one in written
    ]
    assert list(read) == expected
    assert read[1:-1] == tuple(expected[1:-1])
    assert list(reversed(read)) == expected[::-1]


def test_subsets_select_by_position_and_refuse_positions_beyond_the_end(tmp_path: Path) -> None:
    written = [Sample(SampleKey(str(number)), "train", "", (), ()) for number in range(5)]
    read = SampleFile(written, folder=tmp_path / "made" / "here")
    chosen = SampleSubset(read, array("q", [4, 0, 2]))
    assert [one.id for one in chosen] == ["4", "0", "2"]
    assert [one.id for one in chosen[1:]] == ["0", "2"]
    assert (read[-1].id, len(read), len(chosen)) == ("4", 5, 3)
    assert not list((tmp_path / "made" / "here").iterdir())  # the file has no name
    assert pickle.loads(pickle.dumps(chosen)) == tuple(chosen)
    with pytest.raises(IndexError):
        read[5]


def test_a_folder_that_cannot_hold_them_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/runs: cannot be written to: Not a directory; give another runs_dir"):
        SampleFile([], folder=tmp_path / "file" / "runs")

    def reading(number: int) -> Iterator[Sample]:
        yield Sample(SampleKey("1"), "train", "", (), ())
        raise OSError(number, "while reading")

    with pytest.raises(StillhouseError, match="has no room for the plan's samples"):
        SampleFile(reading(errno.ENOSPC), folder=tmp_path)
    with pytest.raises(OSError, match="while reading"):  # not the folder's
        SampleFile(reading(errno.EIO), folder=tmp_path)
