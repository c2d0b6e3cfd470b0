from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storage.backends.folder import open_folder
from storage.config import SelectionSection
from storage.errors import CacheError, ConfigError, IdentityError
from storage.images.settings import PixelSettings
from storage.reader.cache import Cache
from student_train.config import StageSection
from student_train.data.collate import expand_tokens
from student_train.data.sample_images import open_images
from student_train.losses.config import DistributionLossSection, LossesSection
from student_train.training.stage_data import load_cached_teacher, prepare_stage_data
from tests.student_train.caches import make_cache


def stage(checkpoint: Path, losses: dict | None = None, **fields: object) -> StageSection:
    return StageSection.model_validate(
        {"init": str(checkpoint), "steps": 1, "losses": LossesSection.model_validate(losses or {}), **fields}
    )


def test_the_samples_of_the_splits_are_counted(checkpoint: Path, cache: Path) -> None:
    stage_data = prepare_stage_data(stage(checkpoint, splits=("test",)), str(cache))
    opened = Cache.open(cache, ())
    assert [opened.splits[index] for index in stage_data.table.indices] == ["test"] * 24
    counts = [opened.read(int(index)).tokens.num_response_tokens for index in stage_data.table.indices]
    assert stage_data.table.num_response_rows.tolist() == counts
    tokens = expand_tokens(opened.read_many(stage_data.table.indices), stage_data.checkpoint.sequence_format)
    assert stage_data.table.lengths is not None
    assert stage_data.table.lengths.tolist() == tokens.lengths.tolist()
    assert stage_data.mixture.sources[0].images is None
    teacher = load_cached_teacher(stage_data, LossesSection())
    assert (teacher.centered, teacher.pool, teacher.head) == (False, None, None)


def test_an_unknown_split_is_the_user_s_mistake(checkpoint: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match="no sample is in the splits trian; the cache has test, train"):
        prepare_stage_data(stage(checkpoint, splits=("trian",)), str(cache))


def test_a_moved_project_has_the_same_inputs_and_finds_its_images(checkpoint: Path, tmp_path: Path) -> None:
    """The inputs hold no path, and images are found in the new folder."""
    path = make_cache(tmp_path / "old", checkpoint, num_samples=4)
    before = prepare_stage_data(stage(checkpoint), str(path)).cache.identity
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "old", tmp_path / "elsewhere/new")
    moved = tmp_path / "elsewhere/new" / path.relative_to(tmp_path / "old")
    stage_data = prepare_stage_data(stage(checkpoint), str(moved))
    assert stage_data.cache.identity.content_json() == before.content_json()
    assert stage_data.cache.identity.image_root.startswith(str(tmp_path / "old"))
    folder = open_images(stage_data.cache, None, stage_data.checkpoint.image_processor)
    record = next(record for index in range(4) if (record := stage_data.cache.read(index).tokens).images)
    assert folder.load_picture(record.images[0], sample_id=record.sample_id).mode == "RGB"


def test_a_family_that_the_cache_lacks_is_named(checkpoint: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path, checkpoint, num_samples=2, families=("response",))
    with pytest.raises(CacheError, match="not visual"):
        prepare_stage_data(stage(checkpoint, {"visual": {}}), str(path))


def test_an_unfinished_cache_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path, checkpoint, num_samples=2)
    (path / "manifest.json").unlink()
    with pytest.raises(CacheError, match="has not finished"):
        prepare_stage_data(stage(checkpoint), str(path))


def test_a_tokenizer_that_differs_is_refused_before_weights_are_read(checkpoint: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path, checkpoint, num_samples=2, tokenizer_fingerprint="f" * 64)
    with pytest.raises(IdentityError, match=f"tokenizer_fingerprint: the cache has {'f' * 64}"):
        prepare_stage_data(stage(checkpoint), str(path))


def test_a_grid_that_cannot_be_resampled_is_refused_only_with_visual_losses(checkpoint: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "line", checkpoint, num_samples=2, tokens_per_image=10)
    for family in ("visual", "relation"):
        with pytest.raises(
            IdentityError, match=r"10 visual tokens .* this student has 16, and 10 .* not a square grid"
        ):
            prepare_stage_data(stage(checkpoint, {family: {}}), str(path))
    assert len(prepare_stage_data(stage(checkpoint, {"response": {}}), str(path)).table) == 2
    square = make_cache(tmp_path / "square", checkpoint, num_samples=2, tokens_per_image=9)
    table = prepare_stage_data(stage(checkpoint, {"visual": {}}), str(square)).table
    assert table.count_rows(table.indices).visual == 18  # rows of the teacher


def test_a_temperature_must_be_stored_where_the_tail_matters(checkpoint: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path, checkpoint, num_samples=2, temperatures=(2.0,))
    assert prepare_stage_data(stage(checkpoint, {"response": {"temperature": 2.0}}), str(path))
    with pytest.raises(
        ConfigError, match=r"losses\.response\.temperature is 3, but the cache stores .* 1, 2; dump with"
    ):
        prepare_stage_data(stage(checkpoint, {"response": {"temperature": 3.0}}), str(path))
    assert prepare_stage_data(
        stage(checkpoint, {"response": {"temperature": 3.0, "treatment": "renormalise"}}), str(path)
    )


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (
            {"response": {"divergence": "reverse_kl", "treatment": "truncate"}},
            "'truncate', which cannot give 'reverse_kl'",
        ),
        ({"response": {"divergence": "jsd", "treatment": "unbiased"}}, "'unbiased', which cannot give 'jsd'.* bucket"),
        ({"response": {"temperature": 2, "treatment": "unbiased"}}, "needs temperature 1, but it is 2"),
        ({"response": {"beta": 0.5}}, "beta belongs to jsd and skewed_kl"),
        ({"visual": {"treatment": "exact"}}, "visual.treatment 'exact' needs hidden states"),
        ({"relation": {"weight": 0.5}, "literal": True}, "weights are all 1"),
        ({"response": {"k": 8, "treatment": "unbiased"}}, "sampled entries, which k drops"),
        ({"response": {"k": 8, "treatment": "profile"}}, "remove k and tau"),
        ({"visual": {"k": 8, "tau": 0.1}}, "k is 8 and tau is 0.1; give only one of them"),
    ],
)
def test_invalid_loss_combinations_are_refused(losses: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LossesSection.model_validate(losses)


def test_the_unbiased_treatment_needs_sampled_rows(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    losses = {"response": {"treatment": "unbiased"}}
    with pytest.raises(ConfigError, match=r"losses\.response\.treatment is 'unbiased', .* by 'topk'"):
        prepare_stage_data(stage(checkpoint, losses), str(cache))
    path = make_cache(tmp_path, checkpoint, num_samples=2, tau=0.05)
    assert len(prepare_stage_data(stage(checkpoint, losses), str(path)).table) == 2


def test_a_loss_may_read_fewer_entries_than_are_stored(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path, checkpoint, num_samples=2, tau=0.05)
    whole = prepare_stage_data(stage(checkpoint, {"response": {}}), str(path)).cache.read(0).response
    fewer = (
        prepare_stage_data(stage(checkpoint, {"response": {"k": 1, "treatment": "bucket"}}), str(path))
        .cache.read(0)
        .response
    )
    higher = prepare_stage_data(stage(checkpoint, {"response": {"tau": 0.5}}), str(path)).cache.read(0).response
    assert whole is not None
    assert fewer is not None
    assert higher is not None
    assert fewer.num_entries < whole.num_entries
    assert higher.num_exact.sum() < whole.num_exact.sum()
    with pytest.raises(ConfigError, match=r"response: tau is 0\.5, .* selected by 'topk'"):
        prepare_stage_data(stage(checkpoint, {"response": {"tau": 0.5}}), str(cache))


def test_the_bucket_needs_exact_entries(checkpoint: Path, tmp_path: Path) -> None:
    selection = {"response": {"method": "sampled", "draws": 20}, "visual": {"method": "threshold", "tau": 0.05}}
    path = make_cache(tmp_path, checkpoint, num_samples=2, tau=0.05, selection={**selection, "relation": {}})
    with pytest.raises(ConfigError, match=r"losses\.response\.treatment is 'bucket', .* stores no exact entries"):
        prepare_stage_data(stage(checkpoint, {"response": {"treatment": "bucket"}}), str(path))


def test_stage_data_comes_from_an_object_store(checkpoint: Path, cache: Path) -> None:
    """Training reads the same as from a local cache; images stay local."""
    pytest.importorskip("moto.server")
    from tests.storage.s3_server import BUCKET, set_s3_environment

    with set_s3_environment():
        url = f"s3://{BUCKET}/cache"
        remote = open_folder(url)
        for path in cache.rglob("*"):
            if path.is_file():
                remote.write(path.relative_to(cache).as_posix(), path.read_bytes())
        losses = {"response": {"treatment": "bucket"}}
        here, there = (prepare_stage_data(stage(checkpoint, losses), place) for place in (str(cache), url))
        assert there.cache.sealed
        assert there.table.indices.tolist() == here.table.indices.tolist()
        chosen = there.table.indices[:5]
        got, expected = (place.cache.read_many(chosen).response for place in (there, here))
        assert got is not None
        assert expected is not None
        assert got.equals(expected)


@pytest.mark.parametrize(
    ("asked", "method", "expected"),
    [
        ({}, "threshold", "unbiased"),
        ({}, "sampled", "unbiased"),
        ({}, "topk", "bucket"),
        ({}, "mass", "bucket"),
        ({"divergence": "cross_entropy"}, "threshold", "unbiased"),
        ({"divergence": "reverse_kl"}, "threshold", "bucket"),
        ({"temperature": 2.0}, "threshold", "bucket"),
        ({"k": 4}, "threshold", "bucket"),
        ({"treatment": "bucket"}, "threshold", "bucket"),
    ],
)
def test_auto_uses_sampled_entries_if_cache_and_loss_allow_it(
    asked: dict[str, object], method: str, expected: str
) -> None:
    selection = SelectionSection.model_validate({"method": method}).selection
    assert DistributionLossSection.model_validate(asked).resolve_treatment(selection) == expected


def test_the_cache_decides_the_treatment(checkpoint: Path, tmp_path: Path) -> None:
    for name, rows, expected in (("drawn", {"tau": 0.1}, "unbiased"), ("cut", {"k": 4}, "bucket")):
        losses = LossesSection.model_validate({"response": {}})
        folder = make_cache(tmp_path / name, checkpoint, families=("response",), **{"k": None, **rows})
        stage_data = prepare_stage_data(StageSection(init=str(checkpoint), steps=1, losses=losses), str(folder))
        assert load_cached_teacher(stage_data, losses).treatments == {"response": expected}


def test_caches_that_ask_for_different_treatments_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    drawn = make_cache(tmp_path / "drawn", checkpoint, families=("response",), k=None, tau=0.1)
    cut = make_cache(tmp_path / "cut", checkpoint, families=("response",), k=4)
    both = {"init": str(checkpoint), "steps": 1, "caches": [{"path": str(drawn)}, {"path": str(cut)}]}
    stage = StageSection.model_validate({**both, "losses": {"response": {}}})
    with pytest.raises(IdentityError, match=r"treatment of response: .* has unbiased, .* has bucket"):
        prepare_stage_data(stage, "")
    prepare_stage_data(StageSection.model_validate({**both, "losses": {"response": {"treatment": "bucket"}}}), "")


def test_caches_of_different_pixels_are_refused_in_one_stage(checkpoint: Path, tmp_path: Path) -> None:
    white = make_cache(tmp_path / "white", checkpoint, num_samples=4, families=("response",))
    black = make_cache(
        tmp_path / "black",
        checkpoint,
        num_samples=4,
        families=("response",),
        pixels=PixelSettings(background="#000000"),
    )
    old = make_cache(tmp_path / "old", checkpoint, num_samples=4, families=("response",), pixels=None)
    for other, field in ((black, "pixels.background"), (old, "pixels.version")):
        both = {"init": str(checkpoint), "steps": 1, "caches": [{"path": str(white)}, {"path": str(other)}]}
        with pytest.raises(IdentityError, match=field):
            prepare_stage_data(StageSection.model_validate({**both, "losses": {"response": {}}}), "")
