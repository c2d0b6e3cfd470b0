"""Counts, sizes and the least sure answers are those that reading every sample gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stillhouse.inspection.cache_facts import collect_facts, convert_facts, find_least_sure
from stillhouse.inspection.sample_text import format_facts
from storage.errors import CacheError
from storage.reader.cache import Cache
from tests.storage.synthetic_cache import TAU, write_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder, num_parts=3)
    return Cache.open(folder)


def test_sizes_are_those_on_disk(cache: Cache) -> None:
    facts = collect_facts(cache)
    for name, family in facts.families.items():
        files = (Path(str(cache.folder)) / name).glob("*.parquet")
        assert family.num_bytes == sum(file.stat().st_size for file in files)
    assert facts.num_bytes == sum(family.num_bytes for family in facts.families.values())
    records = [cache.read(index) for index in range(cache.num_samples)]
    visual = {key: rows.num_rows for record in records for key, rows in record.visual.items()}
    assert facts.families["tokens"].num_rows == len(records) == 18
    assert facts.families["response"].num_rows == sum(record.response.num_rows for record in records if record.response)
    assert facts.families["visual"].num_rows == sum(visual.values())
    assert facts.families["relation"].num_rows == len(visual)
    response = facts.families["response"]
    assert response.num_rows
    assert response.bytes_per_row == pytest.approx(response.num_bytes / response.num_rows)
    assert facts.num_samples_by_split == {"test": 3, "train": 15}
    assert facts.errors == {f"broken-{part}": "image is truncated" for part in range(3)}


def test_saved_bytes_are_those_of_a_copy_for_each_sample(cache: Cache) -> None:
    sharing = collect_facts(cache).image_sharing
    records = [cache.read(index) for index in range(cache.num_samples)]
    named = [(image.key, image.num_visual_tokens) for record in records for image in record.tokens.images]
    stored = dict(named)
    assert (sharing.num_named, sharing.num_stored) == (len(named), len(stored))
    assert len(named) > len(stored)  # or nothing is shared here
    extra_tokens = sum(size for _, size in named) - sum(stored.values())
    for family, saved in sharing.saved_bytes_by_family.items():
        size = cache.statistics()["bytes_by_family"][family]
        assert saved == pytest.approx(size * extra_tokens / sum(stored.values()), abs=1)
    assert sharing.saved_bytes == sum(sharing.saved_bytes_by_family.values()) > 0


def test_a_cache_without_signals_of_images_saved_nothing(tmp_path: Path) -> None:
    write_cache(tmp_path, families=("response",))
    facts = collect_facts(Cache.open(tmp_path))
    assert facts.image_sharing.saved_bytes == 0
    assert facts.image_sharing.num_stored > 0


def test_an_unfinished_cache_is_described(tmp_path: Path) -> None:
    write_cache(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "commits" / "part-00001.json").unlink()
    facts = collect_facts(Cache.open(tmp_path))
    assert (facts.sealed, facts.num_parts, facts.num_planned_parts, facts.num_samples) == (False, 1, 2, 6)


def test_facts_are_json(cache: Cache) -> None:
    document = json.loads(json.dumps(convert_facts(collect_facts(cache))))
    assert document["identity"]["vocab_size"] == cache.identity.vocab_size
    assert document["families"]["visual"]["bytes_per_row"] > 0
    assert document["image_sharing"]["saved_bytes"] > 0


def test_the_least_sure_answers_have_the_greatest_mean_entropy(cache: Cache) -> None:
    means = {}
    for index in range(cache.num_samples):
        rows = cache.read(index).response
        assert rows is not None
        if rows.num_rows:
            means[index] = float(np.mean(rows.entropy.astype(np.float64)))
    expected = sorted(means, key=lambda index: -means[index])
    found = find_least_sure(cache, 5)
    assert [index for index, _ in found] == expected[:5]
    assert [mean for _, mean in found] == pytest.approx([means[index] for index in expected[:5]])
    assert len(find_least_sure(cache, 1000)) == len(means) < cache.num_samples  # empty answers are left out


def test_finding_the_least_sure_needs_response_rows(tmp_path: Path) -> None:
    write_cache(tmp_path, families=())
    with pytest.raises(CacheError, match="no response rows"):
        find_least_sure(Cache.open(tmp_path), 1)


def test_error_summaries_are_those_of_the_manifest(cache: Cache) -> None:
    facts = collect_facts(cache)
    stated = cache.statistics()["errors_by_family"]
    encoding = {one.family: one for one in facts.error_summaries if one.kind == "errors_by_family"}
    assert encoding.keys() == stated.keys() != set()
    assert all(encoding[family].mean == one["mean"] for family, one in stated.items())
    shown = format_facts(facts)
    assert "encoding" in shown
    assert "budget" not in shown.split("identity")[0]


def test_a_budget_is_shown_with_its_result(tmp_path: Path) -> None:
    predicted = {
        "gradient_error": 0.0187,
        "bytes_per_row": 31.5,
        "distance": 0.1,
        "rows": 8192,
        "calibration_rows": 500,
    }
    setting = {"method": "threshold", "tau": TAU, "rounding_kl": 5e-4}
    budget = {"gradient_error": 0.02, "rows": 8192, "samples": 64, "predicted": predicted}
    write_cache(tmp_path, families=("response",), selection={"response": {**setting, "budget": budget}})
    facts = collect_facts(Cache.open(tmp_path))
    (one,) = facts.budgets
    assert (one.target, one.tau, one.predicted_gradient_error) == ("gradient_error 0.02", TAU, 0.0187)
    assert one.bytes_per_row == facts.families["response"].bytes_per_row
    line = next(line for line in format_facts(facts).splitlines() if "gradient_error 0.02" in line)
    assert "31.5" in line
    assert f"{one.bytes_per_row:.1f}" in line
