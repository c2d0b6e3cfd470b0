import threading

import pytest

from storage import files
from storage.errors import CacheError


def test_exclusive_creation_has_one_winner_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "commit"
    contents = [bytes([number]) * 100_000 for number in range(8)]
    barrier, winners = threading.Barrier(len(contents)), []

    def create(content):
        barrier.wait()
        if files.create_exclusively(path, content):
            winners.append(content)

    threads = [threading.Thread(target=create, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert winners == [path.read_bytes()]
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_writing_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "x"
    for content in (b"a", b"b"):
        files.write_atomically(path, content)
        assert path.read_bytes() == content
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        files.write_atomically(tmp_path / "folder", b"c")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder", "x"]


def test_a_reader_beside_an_atomic_writer_sees_all_or_nothing(tmp_path):
    path = tmp_path / "manifest"
    contents = [bytes([number]) * 500_000 for number in (1, 2)]
    done, torn = threading.Event(), []

    def watch():
        while not done.is_set():
            if path.exists() and (content := path.read_bytes()) not in contents:
                torn.append(len(content))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(40):
        files.write_atomically(path, contents[number % 2])
    done.set()
    watcher.join()
    assert torn == []


def test_temporary_names_are_told_from_others(tmp_path):
    assert files.is_temporary(tmp_path / "part-00000.json.tmp-123-0af3")
    for name in ("part-00000.json", "a.tmp", "tmp-1-a", "a.tmp-x-1"):
        assert not files.is_temporary(tmp_path / name)


@pytest.mark.parametrize("path", ["s3://bucket/x", "gs://x", "file:///x"])
def test_object_storage_is_refused_by_name(path):
    with pytest.raises(CacheError, match="object storage is not supported yet"):
        files.local_folder(path)
