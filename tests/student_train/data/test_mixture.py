"""Several caches read as one: samples, weights, order, and a training step over two of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from storage.errors import CacheError, ConfigError, IdentityError
from storage.reader.cache import Cache
from storage.reader.shuffle import Shuffle
from student_train.config import EvaluationSection, SourceSection, StageSection
from student_train.data.mixture import CacheSource, InterleavedOrder, Mixture
from student_train.data.sample_images import TensorStore, VisionGatherer
from student_train.evaluation.model_evaluation import evaluate_model
from student_train.models.huggingface import load_image_processor
from student_train.training.stage_data import StageData, prepare_stage_data
from student_train.training.stage_inputs import collect_stage_inputs, compare_state_inputs
from tests.hypothesis_profiles import examples
from tests.student_train.caches import make_cache
from tests.student_train.conftest import Runner
from tests.student_train.training.test_resume import STOP_AT

LOSSES = {"response": {}, "visual": {}, "relation": {}}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A cache of ten samples of the split `more`, with ids and images that the shared cache also has."""
    folder = tmp_path_factory.mktemp("other")
    return make_cache(folder, checkpoint, num_samples=10, num_images=5, splits=("train", "more"), seed=1)


def stage_data(checkpoint: Path, caches: list[dict], **fields: object) -> StageData:
    return prepare_stage_data(stage(checkpoint, caches, **fields), "")


def stage(checkpoint: Path, caches: list[dict], **fields: object) -> StageSection:
    given = {"init": str(checkpoint), "steps": 1, "losses": LOSSES, "caches": caches, **fields}
    return StageSection.model_validate(given)


def test_a_weight_is_the_number_of_times_that_samples_occur(checkpoint: Path, cache: Path, other: Path) -> None:
    sources = [{"path": str(cache), "weight": 2}, {"path": str(other), "weight": 0.5, "splits": ["more"]}]
    table = stage_data(checkpoint, sources).table
    assert table.order is not None
    assert len(table.indices) == 24 + 10
    assert len(table) == 2 * 24 + 5
    first, second = (table.order.batch(step, len(table), seed=3) for step in range(2))
    for epoch in (first, second):
        assert (np.bincount(epoch, minlength=34)[:24] == 2).all()
        assert np.bincount(epoch, minlength=34)[24:].max() == 1
    both = np.bincount(np.concatenate([first, second]), minlength=34)
    assert both.tolist() == [4] * 24 + [1] * 10  # the other half of the second cache in the second epoch
    assert first.tolist() != second.tolist()


@settings(max_examples=examples(40))
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.2, 0.5, 1.0, 1.5, 3.0]), min_size=4, max_size=4),
    batch=st.integers(1, 50),
)
def test_batches_are_cut_from_one_endless_sequence(sizes: list[int], weights: list[float], batch: int) -> None:
    def order() -> InterleavedOrder:
        return InterleavedOrder([Shuffle.plain(size) for size in sizes], weights[: len(sizes)])

    whole = np.concatenate([order().epoch(epoch, seed=5) for epoch in range(4)])
    steps = len(whole) // batch
    backwards = {step: order().batch(step, batch, seed=5) for step in reversed(range(steps))}
    cut = [backwards[step] for step in range(steps)]
    assert np.concatenate([[], *cut]).tolist() == whole[: steps * batch].tolist()
    starts = np.cumsum([0, *sizes])
    for size, start, weight in zip(sizes, starts[:-1], weights, strict=False):
        own = whole[(whole >= start) & (whole < start + size)]
        assert len(own) == 4 * max(1, round(weight * size))
        assert np.ptp(np.bincount(own - start, minlength=size)) <= 1  # all equally often, but for one begun round


def test_a_single_cache_keeps_the_order_of_its_shuffle(checkpoint: Path, cache: Path) -> None:
    table = stage_data(checkpoint, [{"path": str(cache)}]).table
    assert table.order is not None
    expected = Cache.open(cache, ()).shuffle(table.indices)
    for epoch in range(3):
        assert table.order.batch(epoch, 24, seed=7).tolist() == expected.epoch(epoch, seed=7).tolist()


def test_each_cache_keeps_the_order_of_its_own_window() -> None:
    blocks = np.repeat(np.arange(20), 50)
    orders = [Shuffle(blocks, np.full(20, 50), window_rows=100) for _ in range(2)]
    mixed = InterleavedOrder(orders, [1.0, 1.0]).epoch(0, seed=1)
    first = mixed[mixed < 1000]
    assert first.tolist() == orders[0].epoch(0, seed=1).tolist()
    assert mixed[mixed >= 1000].tolist() != (first + 1000).tolist()  # caches of one size are not in step
    places = np.flatnonzero(mixed < 1000)
    assert abs(places.mean() - 1000) < 50  # evenly over the epoch


def test_records_are_read_from_the_cache_that_holds_them(checkpoint: Path, cache: Path, other: Path) -> None:
    found = stage_data(checkpoint, [{"path": str(cache)}, {"path": str(other), "splits": ["train", "more"]}])
    caches = [Cache.open(cache), Cache.open(other)]
    chosen = found.table.indices[[30, 0, 43, 5]]
    samples = found.mixture.read_many(chosen)
    images = found.mixture.images(found.checkpoint.image_processor)
    for record, index in zip(samples.records(), chosen.tolist(), strict=True):
        number, own = (0, index) if index < 48 else (1, index - 48)
        expected = caches[number].read(own)
        assert record.tokens.sample_id == f"{number}:{expected.tokens.sample_id}"
        assert record.tokens.token_ids.tolist() == expected.tokens.token_ids.tolist()
        assert record.response is not None
        assert expected.response is not None
        assert record.response.equals(expected.response)
        image = record.tokens.images[0]  # of the same path and, in its prompt, the same key in both
        pixels = images.load_pixels(image, sample_id="", index=index)  # its sha256 is checked
        assert record.visual[image.key].equals(expected.visual[image.key])
        np.testing.assert_array_equal(record.relation[image.key].values, expected.relation[image.key].values)
        assert pixels.shape == (3, 32, 32)
    rows = [cached.num_response_rows for cached in caches]
    counted = found.table.count_rows(np.array([30, 0]))
    expected_rows = rows[1][found.table.indices[30] - 48] + rows[0][found.table.indices[0]]
    assert counted.response == expected_rows
    assert (counted.visual, counted.relation, counted.samples) == (32, 2, 2)


def test_an_image_that_two_caches_show_has_the_rows_and_the_file_of_the_sample_s_own(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Ids, image keys and paths are equal in both; the caches hold the images, whose folders are gone."""
    families = ("response", "visual", "relation", "images")
    paths = [
        make_cache(tmp_path / str(k), checkpoint, k=k, families=families, num_samples=4, num_images=2) for k in (8, 3)
    ]
    caches = [Cache.open(path) for path in paths]
    mixture = Mixture([CacheSource(each, np.arange(each.num_samples)) for each in caches])
    processor = load_image_processor(checkpoint)
    chosen = [8, 0, 10, 2, 9]  # samples 0, 0, 2, 2 and 1 of caches 1, 0, 1, 0 and 1

    def pixels() -> torch.Tensor | None:
        source = VisionGatherer(mixture.images(processor), features=None, pixels=TensorStore(0))
        return source.gather(mixture.read_many(chosen)).pixel_values

    before = pixels()
    for path in paths:
        (path.parent / "images").rename(path.parent / "moved")
    batch = mixture.read_many(chosen)
    assert batch.visual is not None
    assert batch.visual.num_exact.reshape(5, 16)[:, 0].tolist() == [3, 8, 3, 8, 3]
    (image,), (same,) = batch.images[:2]
    assert image == same
    for record, index in zip(batch.records(), chosen, strict=True):
        expected = caches[index // 8].read(index % 8)
        (shown,) = record.tokens.images
        assert record.visual[shown.key].equals(expected.visual[shown.key])
    torch.testing.assert_close(pixels(), before, rtol=0, atol=0)


def test_caches_with_other_temperatures_are_evaluated_together(checkpoint: Path, tmp_path: Path) -> None:
    judged = copytree(checkpoint, tmp_path / "judged")
    paths = [
        make_cache(tmp_path / str(len(temperatures)), checkpoint, num_samples=2, families=("response",),
                   temperatures=temperatures)
        for temperatures in ((), (2.0,))
    ]  # fmt: skip
    section = EvaluationSection(splits=("test",), max_new_tokens=1, batch=8)
    document = evaluate_model(judged, [SourceSection(path=str(path)) for path in paths], section)
    assert document["num_samples"] == 4
    assert document["kl_to_teacher"] > 0


@pytest.mark.parametrize(
    ("fields", "losses", "words"),
    [
        ({"temperatures": (2.0,)}, {"response": {}}, r"selection\.response\.temperatures: .* has \(\), .* \(2\.0,\)"),
        ({"selection": {"relation": {"centered": True}}}, {"relation": {}}, r"selection\.relation\.centered: .*True"),
        ({"tokenizer_fingerprint": "0" * 64}, {}, "tokenizer_fingerprint: the cache has 000"),
    ],
)
def test_caches_that_differ_in_needed_fields_are_refused_by_field(
    checkpoint: Path, cache: Path, tmp_path: Path, fields: dict, losses: dict, words: str
) -> None:
    odd = make_cache(tmp_path, checkpoint, num_samples=2, **fields)
    with pytest.raises(IdentityError, match=words):
        stage_data(checkpoint, [{"path": str(cache)}, {"path": str(odd)}], losses=losses)


def test_a_family_that_one_cache_lacks_is_named(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    poor = make_cache(tmp_path, checkpoint, num_samples=2, families=("response",))
    with pytest.raises(CacheError, match="not visual"):
        stage_data(checkpoint, [{"path": str(cache)}, {"path": str(poor)}])
    with pytest.raises(ConfigError, match=f"{poor}: no sample is in the splits typo"):
        stage_data(checkpoint, [{"path": str(cache)}, {"path": str(poor), "splits": ["typo"]}], losses={"response": {}})
    with pytest.raises(ValueError, match="cache and caches are both given; remove one"):
        stage_data(checkpoint, [{"path": str(cache)}], cache=str(poor))


def test_profiles_are_averaged_by_their_rows_in_an_epoch(checkpoint: Path, tmp_path: Path) -> None:
    from student_train.training.stage_data import _average_tail_profiles

    class Fixed:
        def __init__(self, profile: list[float], rows: list[int]) -> None:
            self.num_response_rows = np.array(rows)
            self._profile = np.array(profile, np.float32)

        def tail_profile(self, _family: str) -> np.ndarray:
            return self._profile

    class Two:
        class _Source:
            def __init__(self, cache: Fixed, weight: float, indices: list[int]) -> None:
                self.cache, self.weight, self.indices = cache, weight, np.array(indices)

        sources = (_Source(Fixed([1, 0], [5, 1, 7]), 2.0, [0, 1]), _Source(Fixed([0, 1], [4]), 1.0, [0]))

    assert _average_tail_profiles(Two(), "response").tolist() == [0.75, 0.25]  # pyright: ignore[reportArgumentType]


@pytest.mark.ci
@pytest.mark.slow
def test_a_stage_over_two_caches_trains_and_resumes_bit_exactly(
    make_runner: Callable[..., Runner], cache: Path, other: Path
) -> None:
    stage = {
        "caches": [
            {"path": str(cache), "weight": 0.5, "filter": [["category", "in", ["left", "right"]]]},
            {"path": str(other), "weight": 3, "splits": ["train", "more"]},
        ],
        "losses": LOSSES, "steps": 5, "zero_stage": 0, "memory_mb": 1,
        "checkpoints": {"every": 5, "splits": ["test"]},  # which the second cache has none of
    }  # fmt: skip
    runner = make_runner(whole=stage, stopped=stage)
    (first,) = runner.run_in_turn(("stopped",), prologue=STOP_AT.format(step=2))
    assert first.code == 143, first.stderr
    again, whole = runner.run_in_turn(("stopped",), ("whole", "--evaluate", "evaluation.splits=[test, more]"))
    assert (again.code, whole.code) == (0, 0), again.stderr + whole.stderr
    judged = json.loads((runner.output("whole") / "evaluation.json").read_text())["samples"]
    assert Counter(sample["sample_id"].split("-")[0] for sample in judged) == {"0:test": 24, "1:more": 10}
    expected = load_file(runner.output("whole") / "model.safetensors")
    for name, weight in load_file(runner.output("stopped") / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


def test_a_model_is_evaluated_on_the_held_out_samples_of_every_cache(
    checkpoint: Path, cache: Path, other: Path, tmp_path: Path
) -> None:
    poor = make_cache(tmp_path, checkpoint, num_samples=4, families=(), splits=("train", "more"), seed=2)
    judged = copytree(checkpoint, tmp_path / "judged")
    sources = [SourceSection(path=str(path)) for path in (cache, other, poor)]

    def document(chosen: list[SourceSection], splits: tuple[str, ...]) -> dict[str, Any]:
        return evaluate_model(judged, chosen, EvaluationSection(splits=splits, max_new_tokens=3, batch=7))

    alone = [
        document([source], splits) for source, splits in zip(sources, [("test",), ("more",), ("more",)], strict=True)
    ]
    whole = document([*sources, sources[0]], ("test", "more"))
    expected = [
        {**sample, "sample_id": f"{number}:{sample['sample_id']}"}
        for number, each in enumerate(alone)
        for sample in each["samples"]
    ]
    assert whole["samples"] == expected
    assert whole["num_samples"] == 24 + 10 + 4
    caches = [Cache.open(path, ()) for path in (cache, other)]
    rows = [
        int(each.num_response_rows[np.array(each.splits) == split].sum())
        for each, split in zip(caches, ("test", "more"), strict=True)
    ]
    mean = np.average([each["kl_to_teacher"] for each in alone[:2]], weights=rows)  # the third has no teacher's rows
    assert whole["kl_to_teacher"] == pytest.approx(mean, rel=1e-5)
    assert [sample["sample_id"][0] for sample in document(sources[:2], ("more",))["samples"]] == ["1"] * 10
    with pytest.raises(ConfigError, match=r"no sample is in the splits typo; the caches have more, test, train"):
        document(sources, ("typo",))


def test_the_inputs_of_other_data_differ_in_named_fields(checkpoint: Path, cache: Path, other: Path) -> None:
    def changes(sources: list[dict]) -> list[str]:
        return compare_state_inputs(inputs(pair), inputs(sources), "kd")

    def inputs(sources: list[dict]) -> dict:
        return collect_stage_inputs(stage(checkpoint, sources), stage_data(checkpoint, sources))

    pair = [{"path": str(cache)}, {"path": str(other)}]
    assert changes(pair) == []
    assert changes(pair[:1]) == ["caches: were 2, are 1"]
    assert changes([pair[0], {**pair[1], "weight": 2}]) == ["caches.1.weight: was 1.0, is 2.0"]
    filtered = changes([pair[0], {**pair[1], "filter": [["category", "==", "left"]]}])
    names = "caches.1.filter", "caches.1.num_samples", "caches.1.samples"
    assert tuple(line.split(":")[0] for line in filtered) == names
