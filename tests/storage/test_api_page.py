"""Runs the snippets of storage/README.md unchanged and in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from tests.storage.synthetic_cache import write_cache

PAGE = Path(__file__).resolve().parents[2] / "storage" / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_every_snippet_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "runs" / "digits" / "cache", num_parts=3)
    names: dict[str, object] = {}
    for number, snippet in enumerate(SNIPPETS, 1):
        exec(compile(snippet, f"storage/README.md, snippet {number}", "exec"), names)
    assert len(SNIPPETS) == 5  # open, read by id, iterate, shuffled batches, write
    written = verify(tmp_path / "runs" / "test_split")
    assert written.ok, written.problems
    ours, theirs = Cache.open("runs/digits/cache"), Cache.open("runs/test_split")
    assert theirs.sample_ids == [f"sample-{part}-0" for part in range(3)]
    for index, sample_id in enumerate(theirs.sample_ids):
        copy, original = theirs.read(index).response, ours.read(ours.index_of(sample_id)).response
        assert copy is not None
        assert original is not None
        assert (copy.entropy == original.entropy).all()
