import threading

import pytest

from storage.backends import folder as files
from storage.errors import CacheError, WriteError


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
    with pytest.raises(WriteError, match="folder: cannot be written: Is a directory"):
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


def test_temporary_names_are_told_from_others():
    assert files.is_temporary("part-00000.json.tmp-123-0af3")
    for name in ("part-00000.json", "a.tmp", "tmp-1-a", "a.tmp-x-1"):
        assert not files.is_temporary(name)


def test_a_file_url_is_a_local_folder(tmp_path):
    folder = files.open_folder(f"file://{tmp_path}")
    assert folder == files.LocalFolder(tmp_path)
    assert not folder.is_remote


def test_an_unknown_protocol_is_refused_by_name():
    with pytest.raises(CacheError, match=r"nowhere://x: nowhere:// cannot be opened.*install"):
        files.open_folder("nowhere://x")


def test_what_is_below_a_folder_is_listed_by_name(tmp_path):
    folder = files.LocalFolder(tmp_path)
    assert folder.list_files("commits") == []
    folder.make_folders(["commits/0001"])
    for name in ("b", "a", "commits/x", "commits/0001/y"):
        folder.write(name, b"1")
    assert folder.list_files() == ["a", "b"]
    assert folder.list_files("commits") == ["commits/x"]
    assert folder.list_files(deep=True) == ["a", "b", "commits/0001/y", "commits/x"]
    folder.remove("a")
    folder.remove("a")
    assert folder.list_files() == ["b"]


def test_a_writer_whose_temporary_file_is_swept_away_writes_it_again(tmp_path):
    """A killed writer's temporary files are deleted when a cache is sealed, and a live one's look the same."""
    folder, done = files.LocalFolder(tmp_path), threading.Event()

    def sweep():
        while not done.is_set():
            for name in folder.list_files():
                if files.is_temporary(name):
                    folder.remove(name)
                    swept.append(name)
                    return

    swept: list[str] = []
    for number in range(30):
        sweeper = threading.Thread(target=sweep)
        sweeper.start()
        content = bytes([number]) * 300_000
        assert folder.create(f"part-{number}", content)
        done.set()
        sweeper.join()
        done.clear()
        assert folder.read(f"part-{number}") == content
    assert swept


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"file: cannot be written: .*cache\.path.*committed parts are kept"):
        files.LocalFolder(tmp_path / "file").make_folders(["tokens"])
    with pytest.raises(CacheError, match=r"gone/part: cannot be written: No such file"):
        files.LocalFolder(tmp_path / "gone").write("part", b"")
