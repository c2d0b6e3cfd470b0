"""A step counts as done only if its inputs are the same and its outputs exist."""

import pytest

from stillhouse.ledger import Ledger, fingerprint_cache, fingerprint_path
from storage.errors import CacheError
from storage.writer.cache_writer import CacheWriter
from tests.storage.synthetic_cache import make_identity, make_part, write_cache


def test_a_step_is_done_only_with_the_same_inputs_and_existing_outputs(tmp_path):
    ledger, output = Ledger(tmp_path / "steps"), tmp_path / "out"
    assert not ledger.is_done("train", {"lr": 1}, [])
    output.touch()
    ledger.record("train", {"lr": 1})
    assert ledger.is_done("train", {"lr": 1}, [output])
    assert not ledger.is_done("train", {"lr": 2}, [output])
    output.unlink()
    assert not ledger.is_done("train", {"lr": 1}, [output])


@pytest.mark.parametrize("left", [b'{"step": "', b"", b"\0" * 100, b"\xff\xfe\xfd", b"[]", b"null"])
def test_a_torn_entry_counts_as_not_done(tmp_path, left):
    ledger = Ledger(tmp_path)
    ledger.record("train", {"lr": 1})
    (tmp_path / "train.json").write_bytes(left)
    assert not ledger.is_done("train", {"lr": 1}, [])


def test_folder_fingerprint_sees_names_and_bytes(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = fingerprint_path(folder)
    (folder / "a").write_text("2")
    second = fingerprint_path(folder)
    (folder / "a").rename(folder / "b")
    assert len({first, second, fingerprint_path(folder)}) == 3


def test_a_cache_s_fingerprint_changes_with_any_segment_and_nothing_else(tmp_path):
    write_cache(tmp_path, families=("response",))
    first = fingerprint_cache(str(tmp_path))
    (tmp_path / "dump.json").write_text("{}")
    assert fingerprint_cache(str(tmp_path)) == first
    writer = CacheWriter.open(tmp_path, make_identity(), ("visual",))
    second = fingerprint_cache(str(tmp_path))
    for part in range(2):
        writer.write_part(part, make_part(part, families=("visual",)))
    assert fingerprint_cache(str(tmp_path)) == second
    writer.seal()
    assert len({first, second, fingerprint_cache(str(tmp_path))}) == 3
    with pytest.raises(CacheError, match="no cache is here"):
        fingerprint_cache(str(tmp_path / "nowhere"))


def test_a_step_that_is_done_again_says_which_field_changed(tmp_path):
    ledger, output = Ledger(tmp_path), tmp_path / "out"
    assert ledger.explain_redo("train", {"lr": 1}, [output]) == []
    ledger.record("train", {"stage": {"lr": 1, "steps": 3}, "init": "a" * 64})
    found = ledger.explain_redo("train", {"stage": {"lr": 2, "steps": 3}, "init": "b" * 64}, [output])
    shown = [f"init: was {'a' * 12}…, is {'b' * 12}…", f"{output}: is missing"]
    assert found == ["stage.lr: was 1, is 2", *shown]
