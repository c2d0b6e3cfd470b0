"""DuckDB, pandas, polars and Hugging Face datasets read the scalar columns, as docs/inspecting.md says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from storage.reader.cache import Cache
from tests.storage.synthetic_cache import write_cache

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "inspecting.md").read_text(encoding="utf-8")
TELL = """
import json
print(json.dumps({
    "pandas": {row.sample_id: [list(map(float, row.entropy)), list(map(float, row.tail_mass)),
                               list(map(float, row.label_logprob))] for row in frame.itertuples()},
    "polars": {row["sample_id"]: [row["entropy"], row["tail_mass"], row["label_logprob"]]
               for row in lazy.collect().to_dicts()},
    "datasets": {row["sample_id"]: [row["entropy"], row["tail_mass"], row["label_logprob"]] for row in data},
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("here")
    write_cache(path / "runs" / "digits" / "cache", num_parts=3)
    return path


def snippet(language: str) -> str:
    (found,) = [
        text
        for text in re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
        if "cache/response" in text
    ]
    return found


def test_duckdb_answers_the_query_of_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb

    monkeypatch.chdir(folder)
    with duckdb.connect() as connection:
        answers = connection.execute(snippet("sql")).fetchall()
    cache = Cache.open(folder / "runs" / "digits" / "cache")
    means = {}
    for index, sample_id in enumerate(cache.sample_ids):
        rows = cache.read(index).response
        assert rows is not None
        if rows.num_rows:
            means[sample_id] = float(rows.entropy.astype(np.float64).mean())
    expected = sorted(means.items(), key=lambda item: -item[1])[:10]
    assert len(means) > 10
    assert [sample_id for sample_id, _ in answers] == [sample_id for sample_id, _ in expected]
    assert [mean for _, mean in answers] == pytest.approx([mean for _, mean in expected], rel=1e-5)


def test_pandas_polars_and_datasets_read_the_same_scalars(folder: Path) -> None:
    """In a process of its own, whose caches lie in the test's folder and which finds no network."""
    homes = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    program = snippet("python") + TELL
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=os.environ | homes, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    cache = Cache.open(folder / "runs" / "digits" / "cache")
    expected = {}
    for index, sample_id in enumerate(cache.sample_ids):
        rows = cache.read(index).response
        assert rows is not None
        assert rows.label_logprob is not None
        expected[sample_id] = [rows.entropy.tolist(), rows.tail_mass.tolist(), rows.label_logprob.tolist()]
    assert set(read) == {"pandas", "polars", "datasets"}
    for found in read.values():
        assert found == expected
