from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import ConfigError, StillhouseError
from storage.reader.cache import Cache
from storage.records.records import PooledRelation, RelationFactor
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from teacher_dump.dump import run_dump
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import read_settings
from teacher_dump.workers.worker import Worker, open_preparer, prefetch
from tests.teacher_dump.conftest import WriteConfig
from tests.tiny_architectures import make_teacher


def dump(config: Path) -> Path:
    """Runs a whole dump by one worker in this process, and seals it."""
    settings = read_settings(config)
    planned = plan_dump(settings)
    writer = CacheWriter.open(settings.cache.path, planned.identity, settings.cache.families)
    worker = Worker(make_worker_settings(planned, settings))
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


def test_a_grid_that_depends_on_image_size_is_not_pooled(write_config: WriteConfig, tmp_path: Path) -> None:
    settings = read_settings(
        write_config(
            teacher={"model": str(make_teacher(tmp_path / "qwen", "qwen2_vl"))},
            cache={"families": ["relation"], "relation": {"encoding": "pooled", "pool": 2}},
        )
    )
    with pytest.raises(ConfigError, match=r"cache\.relation\.pool: .* lays out visual tokens by an image's size"):
        open_preparer(make_worker_settings(plan_dump(settings), settings))


def test_a_fixed_grid_that_is_no_square_is_not_pooled(
    write_config: WriteConfig, tiny_teacher: Path, tmp_path: Path
) -> None:
    """A teacher that drops its tower's first patch has 15 visual tokens of 16."""
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    for name in ("config.json", "processor_config.json"):
        document = json.loads((teacher / name).read_text(encoding="utf-8"))
        (teacher / name).write_text(json.dumps({**document, "vision_feature_select_strategy": "default"}))
    settings = read_settings(
        write_config(
            teacher={"model": str(teacher)},
            cache={"families": ["relation"], "relation": {"encoding": "pooled", "pool": 2}},
        )
    )
    with pytest.raises(ConfigError, match=r"cache\.relation\.pool: .* this teacher has 15 visual tokens; leave it out"):
        open_preparer(make_worker_settings(plan_dump(settings), settings))


def test_error_summary_and_tail_profiles_of_a_dump(write_config: WriteConfig) -> None:
    """The manifest splits what was lost, and the profile is the mean of all tails."""
    rows = {"method": "topk", "k": 4, "rounding_kl": 1e-3}
    visual = {"method": "threshold", "tau": 0.01, "draw_sets": 3}
    folder = dump(
        write_config(
            cache={"families": ["response", "visual"], "response": rows, "visual": visual},
            dump={"samples_per_part": 6},
        )
    )
    assert verify(folder).problems == []
    cache = Cache.open(folder)
    statistics = cache.statistics()
    num_rows = statistics["num_rows"]
    assert statistics["teacher_noise"]["response"]["measure"] == "kl"
    assert 0 < statistics["teacher_noise"]["response"]["count"] < num_rows["response"]
    assert statistics["teacher_noise"]["response"]["max"] <= 1e-6  # float32 on a CPU
    selection = statistics["selection_errors"]
    assert (selection["response"]["count"], selection["visual"]["count"]) == (
        num_rows["response"],
        3 * num_rows["visual"],
    )
    assert 0 < selection["visual"]["mean"] <= selection["visual"]["p99"] <= selection["visual"]["max"]
    assert set(statistics["dropped_mass"]) == {"response"}
    tails = np.concatenate([t["tail_mass"].combine_chunks().flatten() for t in cache.tables("response", ["tail_mass"])])
    assert statistics["dropped_mass"]["response"]["mean"] == pytest.approx(tails.mean(), rel=2**-11)
    assert statistics["errors_by_family"]["response"]["measure"] == "rounding_kl"
    for family in ("response", "visual"):
        profile = cache.tail_profile(family)
        assert profile.dtype == np.float32
        assert profile.sum() == pytest.approx(1, abs=1e-5)
    drawn = np.zeros(300)
    for index in range(cache.num_samples):
        for draw_set in range(3):
            for own in cache.read(index, draw_set=draw_set).visual.values():
                sampled = ~own.is_exact()
                np.add.at(drawn, own.ids[sampled], np.exp(own.logprobs[sampled]))
    drawn /= drawn.sum()
    assert np.abs(cache.tail_profile("visual") - drawn).sum() / 2 < 0.15  # the draws are a sample of the profile


def test_epochs_read_other_draws_beside_the_same_exact_entries(write_config: WriteConfig) -> None:
    folder = dump(
        write_config(cache={"families": ["response"], "response": {"method": "threshold", "tau": 0.05, "draw_sets": 2}})
    )
    cache = Cache.open(folder)
    assert cache.identity.selection["response"]["draw_sets"] == 2
    different = 0
    for index in range(cache.num_samples):
        first, second, third = (cache.read(index, draw_set=epoch).response for epoch in range(3))
        assert first is not None
        assert second is not None
        assert third is not None
        assert first.equals(third)
        assert first.num_exact.tolist() == second.num_exact.tolist()
        assert first.ids[first.is_exact()].tolist() == second.ids[second.is_exact()].tolist()
        different += first.ids.tolist() != second.ids.tolist()
    assert different > cache.num_samples / 2


def test_a_selection_that_draws_nothing_has_no_sets(write_config: WriteConfig) -> None:
    config = write_config(cache={"families": ["response"], "response": {"method": "topk", "draw_sets": 2}})
    with pytest.raises(ConfigError, match="draw_sets 2 with method 'topk', which draws nothing"):
        read_settings(config)


def test_prefetch_makes_the_next_item_while_one_is_used() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            yield number

    with ThreadPoolExecutor(1) as executor:
        prefetched_items = prefetch(items(), executor)
        executor.submit(int).result()  # whatever was begun is done
        assert made == [0]
        seen = []
        for item in prefetched_items:
            executor.submit(int).result()
            assert made == list(range(min(item + 2, 4)))  # one ahead, never two
            seen.append(item)
    assert seen == [0, 1, 2, 3]


def test_prefetch_raises_an_error_at_its_item() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise StillhouseError("no more")

    with ThreadPoolExecutor(1) as executor:
        prefetched_items = prefetch(items(), executor)
        assert next(prefetched_items) == 0
        with pytest.raises(StillhouseError, match="no more"):
            next(prefetched_items)


def test_several_threads_write_what_one_does(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(dump={"samples_per_part": 2}, cache={"families": ["response", "visual", "hidden"]})
    alone = dump(config)
    settings = read_settings(config, [f"cache.path={tmp_path / 'together'}"])
    planned = plan_dump(settings)
    worker = Worker(make_worker_settings(planned, settings))
    with ThreadPoolExecutor(5) as threads:
        outcomes = list(threads.map(worker.run, [*planned.plan.parts, *planned.plan.parts]))
    assert [outcome.part for outcome in outcomes] == 2 * [part.number for part in planned.plan.parts]
    assert all(outcome.num_bytes > 0 for outcome in outcomes)
    repeated = worker.run(planned.plan.parts[0])
    assert (repeated.num_samples, repeated.num_tokens) == (
        len(planned.plan.parts[0].samples),
        0,
    )  # not again
    for part in planned.plan.parts:
        name = f"commits/part-{part.number:05}.json"
        one, other = (json.loads((folder / name).read_text()) for folder in (alone, tmp_path / "together"))
        assert one["families"] == other["families"]


def test_a_cache_that_cannot_be_written_to_stops_the_worker(write_config: WriteConfig, tmp_path: Path) -> None:
    settings = read_settings(write_config(dump={"samples_per_part": 8}))
    planned = plan_dump(settings)
    worker = Worker(make_worker_settings(planned, settings))
    worker.run(planned.plan.parts[0])
    shutil.rmtree(tmp_path / "cache/response")
    (tmp_path / "cache/response").write_text("no folder")
    with pytest.raises(StillhouseError, match="response"):
        worker.run(planned.plan.parts[1])
