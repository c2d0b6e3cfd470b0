from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from storage.errors import CacheError, ConfigError, IdentityError
from storage.files import open_folder
from storage.reader import Cache
from student_train.config import LossesSection, StageSection
from student_train.material import SampleMemory, prepare
from tests.storage.family_cache import write_family_cache
from tests.student_train.caches import make_cache


def stage(checkpoint: Path, losses: dict | None = None, **fields: object) -> StageSection:
    return StageSection.model_validate(
        {"init": str(checkpoint), "steps": 1, "losses": LossesSection.model_validate(losses or {}), **fields}
    )


def test_the_samples_of_the_splits_are_counted(checkpoint: Path, cache: Path) -> None:
    material = prepare(stage(checkpoint, splits=("test",)), str(cache))
    opened = Cache.open(cache, ())
    assert [opened.splits[index] for index in material.table.indices] == ["test"] * 24
    counts = [opened.read(int(index)).tokens.num_response_tokens for index in material.table.indices]
    assert material.table.num_response_rows.tolist() == counts
    assert material.images is None
    assert (material.centered, material.relation_pool) == (False, None)


def test_an_unknown_split_is_the_user_s_mistake(checkpoint: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match="no sample is in the splits trian; the cache has test, train"):
        prepare(stage(checkpoint, splits=("trian",)), str(cache))


def test_a_family_that_the_cache_lacks_is_named(checkpoint: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path, checkpoint, num_samples=2, families=("response",))
    with pytest.raises(CacheError, match="not visual"):
        prepare(stage(checkpoint, {"visual": {}}), str(path))


def test_an_unfinished_cache_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path, checkpoint, num_samples=2)
    (path / "manifest.json").unlink()
    with pytest.raises(CacheError, match="has not finished"):
        prepare(stage(checkpoint), str(path))


def test_a_tokenizer_that_differs_is_refused_before_weights_are_read(checkpoint: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path, checkpoint, num_samples=2, tokenizer_fingerprint="f" * 64)
    with pytest.raises(IdentityError, match=f"tokenizer_fingerprint: the cache has {'f' * 64}"):
        prepare(stage(checkpoint), str(path))


def test_a_visual_grid_that_differs_is_refused_for_visual_losses_alone(checkpoint: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path, checkpoint, num_samples=2, tokens_per_image=9)
    for family in ("visual", "relation"):
        with pytest.raises(IdentityError, match="visual grid: the cache has 9 visual tokens"):
            prepare(stage(checkpoint, {family: {}}), str(path))
    assert len(prepare(stage(checkpoint, {"response": {}}), str(path)).table) == 2


def test_the_unbiased_treatment_needs_sampled_rows(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    losses = {"response": {"treatment": "unbiased"}}
    with pytest.raises(ConfigError, match=r"losses\.response\.treatment is 'unbiased', .* by 'topk'"):
        prepare(stage(checkpoint, losses), str(cache))
    path = make_cache(tmp_path, checkpoint, num_samples=2, tau=0.05)
    assert len(prepare(stage(checkpoint, losses), str(path)).table) == 2


def test_the_bucket_needs_exact_entries(checkpoint: Path, tmp_path: Path) -> None:
    selection = {"response": {"method": "sampled", "draws": 20}, "visual": {"method": "threshold", "tau": 0.05}}
    path = make_cache(tmp_path, checkpoint, num_samples=2, tau=0.05, selection={**selection, "relation": {}})
    with pytest.raises(ConfigError, match=r"losses\.response\.treatment is 'bucket', .* keeps no entry exactly"):
        prepare(stage(checkpoint, {"response": {"treatment": "bucket"}}), str(path))


@pytest.mark.parametrize("max_bytes", [0, 20_000, 1 << 30])
def test_remembered_samples_are_those_of_the_cache(cache: Path, max_bytes: int) -> None:
    opened = Cache.open(cache)
    memory = SampleMemory(opened, max_bytes)
    for index in [0, 1, 0, 30, 1, 8, 9]:
        ours, theirs = memory.read(index), opened.read(index)
        assert np.array_equal(ours.tokens.token_ids, theirs.tokens.token_ids)
        assert ours.tokens.images == theirs.tokens.images
        assert ours.response is not None
        assert theirs.response is not None
        assert ours.response.equals(theirs.response)
        for key, rows in theirs.visual.items():
            assert ours.visual[key].equals(rows)
            assert np.array_equal(ours.relation[key].values, theirs.relation[key].values)
    assert (memory.read(0) is memory.read(0)) == (max_bytes > 0)


def test_remembered_samples_keep_their_other_families(tmp_path: Path) -> None:
    write_family_cache(tmp_path)
    opened = Cache.open(tmp_path)
    memory = SampleMemory(opened, 1 << 30)
    for index in (2, 3, 2, 3):
        ours, theirs = memory.read(index), opened.read(index)
        assert theirs.sequence is not None
        assert ours.sequence == theirs.sequence
        assert theirs.hidden is not None
        np.testing.assert_array_equal(ours.hidden, theirs.hidden)
        for key, matrix in theirs.relation.items():
            np.testing.assert_array_equal(ours.relation[key].values, matrix.values)
    assert memory.read(2) is memory.read(2)


def test_images_that_conversations_share_are_remembered_once(cache: Path) -> None:
    opened = Cache.open(cache)
    memory = SampleMemory(opened, 1 << 30)
    first, later = memory.read(0), memory.read(8)  # of the same image, image i % 8, and the same prefix
    (key,) = first.visual
    assert later.visual[key] is first.visual[key]


def test_a_cache_in_an_object_store_is_material(checkpoint: Path, cache: Path) -> None:
    """What training reads is what a local cache holds; images stay local."""
    pytest.importorskip("moto.server")
    from tests.storage.s3_server import BUCKET, s3_environment

    with s3_environment():
        url = f"s3://{BUCKET}/cache"
        remote = open_folder(url)
        for path in cache.rglob("*"):
            if path.is_file():
                remote.write(path.relative_to(cache).as_posix(), path.read_bytes())
        losses = {"response": {"treatment": "bucket"}}
        here, there = (prepare(stage(checkpoint, losses), place) for place in (str(cache), url))
        assert there.cache.sealed
        assert there.images == here.images
        assert there.table.indices.tolist() == here.table.indices.tolist()
        memory = SampleMemory(there.cache, 1 << 20)
        for index in there.table.indices[:5].tolist():
            got, expected = memory.read(index).response, here.cache.read(index).response
            assert got is not None
            assert expected is not None
            assert got.equals(expected)
