from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import ConfigError
from storage.reader import Cache
from storage.records import PooledRelation, RelationFactor
from storage.verify import verify
from storage.writer import CacheWriter
from teacher_dump.dump import plan_dump, read_settings, run_dump, worker_settings
from teacher_dump.worker import Worker, open_preparer
from tests.teacher_dump.conftest import WriteConfig
from tests.tiny_architectures import make_teacher


def dump(config: Path) -> Path:
    """A whole dump by one worker in this process, sealed."""
    settings = read_settings(config)
    planned = plan_dump(settings)
    writer = CacheWriter.open(settings.cache.path, planned.identity, settings.cache.families)
    worker = Worker(worker_settings(planned, settings))
    for part in planned.plan.parts:
        worker.run(part)
    writer.seal()
    return Path(settings.cache.path)


def test_full_rows_come_from_hidden_states_and_the_head(write_config: WriteConfig) -> None:
    folder = dump(
        write_config(
            cache={"families": ["response", "hidden"], "response": {"method": "topk", "k": 300, "rounding_kl": 0}}
        )
    )
    assert verify(folder).problems == []
    cache = Cache.open(folder)
    head = cache.head()
    for index in range(0, cache.num_samples, 5):
        record = cache.read(index)
        assert record.response is not None
        assert record.hidden is not None
        logprobs = head.logprobs(record.hidden)
        assert logprobs.shape == (record.tokens.num_response_tokens, 300)
        stored = np.take_along_axis(logprobs, record.response.ids.reshape(-1, 300).astype(np.int64), axis=1)
        np.testing.assert_allclose(stored.ravel(), record.response.logprobs, atol=0.02)  # both of them float16
        assert record.response.label_logprob is not None
        labels = record.tokens.token_ids[record.tokens.response_mask].astype(np.int64)
        np.testing.assert_allclose(logprobs[np.arange(len(labels)), labels], record.response.label_logprob, atol=0.02)


@pytest.mark.parametrize(
    ("relation", "kind"),
    [
        ({"encoding": "low_rank", "max_cosine_error": 0.01}, RelationFactor),
        ({"encoding": "pooled", "pool": 2}, PooledRelation),
    ],
)
def test_relation_matrices_are_encoded_as_configured(
    write_config: WriteConfig, relation: dict[str, Any], kind: type
) -> None:
    folder = dump(write_config(cache={"families": ["relation"], "relation": relation}))
    assert verify(folder).problems == []
    cache = Cache.open(folder)
    assert cache.identity.selection["relation"].items() >= relation.items()
    assert all(isinstance(matrix, kind) for matrix in cache.read(0).relation.values())
    errors = cache.statistics()["errors_by_family"]["relation"]
    assert errors["count"] == cache.statistics()["num_images"]
    assert 0 < errors["mean"] <= errors["max"]
    assert errors["max"] <= relation.get("max_cosine_error", 1)


def test_images_travel_with_a_cache_that_has_no_teacher(write_config: WriteConfig, tiny_data: Path) -> None:
    config = write_config(cache={"families": ["images"]})
    folder = run_dump(read_settings(config), progress=False).cache
    assert verify(folder).problems == []
    cache = Cache.open(folder)
    assert cache.identity.teacher_fingerprint == "none"
    for index in range(cache.num_samples):
        for image in cache.read(index).tokens.images:
            assert cache.image_bytes(index, image.sha256) == (tiny_data.parent / image.path).read_bytes()


def test_a_grid_that_knows_sizes_is_not_pooled(write_config: WriteConfig, tmp_path: Path) -> None:
    settings = read_settings(
        write_config(
            teacher={"model": str(make_teacher(tmp_path / "qwen", "qwen2_vl"))},
            cache={"families": ["relation"], "relation": {"encoding": "pooled", "pool": 2}},
        )
    )
    with pytest.raises(ConfigError, match=r"cache\.relation\.pool: .* lays out visual tokens by an image's size"):
        open_preparer(worker_settings(plan_dump(settings), settings))
