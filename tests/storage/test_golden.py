"""Caches of every format version that was ever released stay readable, to the number."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from storage.errors import CacheError
from storage.identity import Identity, stored_pixels
from storage.reader.cache import Cache
from storage.records.records import PartRecords
from storage.records.sparse_rows import SparseRows
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.storage.golden import make_v2
from tests.storage.golden.make_v1 import IDENTITY, IMAGES, PARTS, SIGNALS, TAU

V1 = Path(__file__).parent / "golden" / "v1"
V2 = Path(__file__).parent / "golden" / "v2"
V3 = Path(__file__).parent / "golden" / "v3"  # what make_v2.py says, written by the last code of format version 3
V4 = Path(__file__).parent / "golden" / "v4"  # the same in blocks of version 4: make_v4.py
SINCE_2 = pytest.mark.parametrize("golden", [V2, V3, V4], ids=["v2", "v3", "v4"])
SAMPLES = [sample for part in PARTS for sample in part["samples"]]


def assert_rows_hold(got: SparseRows, expected, *, tau: float) -> None:
    assert got.num_rows == len(expected)
    for number, row in enumerate(expected):
        start, stop = got.offsets[number], got.offsets[number + 1]
        split = start + got.num_exact[number]
        assert got.ids[start:split].tolist() == list(row["exact"])
        # stored as float16 logarithms, of which the largest here is 2.8: half a unit is 0.001
        np.testing.assert_allclose(np.exp(got.logprobs[start:split]), list(row["exact"].values()), rtol=2e-3)
        assert got.ids[split:stop].tolist() == list(row["sampled"])
        draws = np.exp(got.logprobs[split:stop]) / max(tau, 1e-9)
        np.testing.assert_allclose(draws, list(row["sampled"].values()), rtol=1e-6)
        for name in ("tail_mass", "entropy"):
            assert getattr(got, name)[number] == np.float32(row[name])
        assert got.log_sum_exp.shape == (len(expected), 0)  # its log_sum_exp was of raw logits, which nothing needs
        if "label_logprob" in row:
            assert got.label_logprob is not None
            assert got.label_logprob[number] == np.float32(row["label_logprob"])


def test_version_1_is_verified_as_it_was():
    report = verify(V1)
    assert report.problems == []
    assert report.notes == []
    assert report.sealed
    assert (report.num_parts, report.num_samples, report.num_images, report.num_errors) == (2, 4, 2, 1)
    assert report.num_rows == {"response": 5, "visual": 5}


def test_version_1_is_opened_with_its_identity_index_and_errors():
    cache = Cache.open(V1)
    assert cache.sealed
    assert cache.families == ("tokens", "response", "visual", "relation")
    assert {name: getattr(cache.identity, name) for name in IDENTITY} == IDENTITY
    assert cache.sample_ids == [sample["sample_id"] for sample in SAMPLES]
    assert cache.splits == [sample["split"] for sample in SAMPLES]
    assert cache.categories == [sample["category"] for sample in SAMPLES]
    assert [(error.sample_id, error.reason) for error in cache.errors] == PARTS[0]["errors"]
    assert cache.image_keys[0] == cache.image_keys[1]  # one image, stored once


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_version_1_records_read_to_the_numbers_they_were_written_with(index):
    sample, got = SAMPLES[index], Cache.open(V1).read(index)
    assert got.tokens.sample_id == sample["sample_id"]
    assert got.tokens.token_ids.tolist() == sample["token_ids"]
    assert got.tokens.response_mask.tolist() == [bool(value) for value in sample["response_mask"]]
    assert [image.path for image in got.tokens.images] == [f"set/{name}" for name in sample["images"]]
    assert got.response is not None
    assert_rows_hold(got.response, sample["response"], tau=TAU)
    assert len(got.visual) == len(got.relation) == len(sample["images"])
    for image, name in zip(got.tokens.images, sample["images"], strict=True):
        assert (image.sha256, image.num_visual_tokens) == (
            IMAGES[name]["sha256"],
            IMAGES[name]["num_visual_tokens"],
        )
        assert_rows_hold(got.visual[image.key], SIGNALS[name]["visual"], tau=0)
        relation = got.relation[image.key]
        np.testing.assert_allclose(relation.values, SIGNALS[name]["relation"], rtol=1e-3)
        assert relation.norm == SIGNALS[name]["norm"]


@SINCE_2
def test_later_versions_are_verified_and_opened_as_they_were(golden):
    report = verify(golden)
    assert report.problems == []
    assert report.notes == []
    assert report.sealed
    assert (report.num_segments, report.num_parts, report.num_samples, report.num_errors) == (2, 2, 4, 1)
    cache = Cache.open(golden)
    assert cache.families == ("tokens", "response", "visual", "relation", "sequence", "hidden")
    selection = {**make_v2.SELECTION, **make_v2.ADDED}
    assert {name: getattr(cache.identity, name) for name in make_v2.IDENTITY} == {
        **make_v2.IDENTITY,
        "selection": selection,
    }
    state = np.array([[1.0, -1.0]], np.float32)
    logits = state @ np.array([*make_v2.HEAD, [0, 0]]).T * 0.25
    np.testing.assert_array_equal(cache.head().logits(state)[:, :3], logits)
    statistics = cache.statistics()
    assert set(statistics["errors_by_family"]) == {"response", "visual", "relation", "hidden"}
    assert statistics["teacher_noise"] == statistics["selection_errors"] == {}
    assert bool(statistics["dropped_mass"]) == (golden != V2)  # version 2 did not measure it
    with pytest.raises(CacheError, match="keeps no tail profile"):
        cache.tail_profile("response")


@SINCE_2
@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_later_versions_records_read_to_the_numbers_they_were_written_with(index, golden):
    sample, got = SAMPLES[index], Cache.open(golden).read(index, draw_set=3)
    assert got.tokens.token_ids.tolist() == sample["token_ids"]
    assert got.response is not None
    assert_blocks_hold(got.response, sample["response"], tau=TAU, temperatures=1)
    for image, name in zip(got.tokens.images, sample["images"], strict=True):
        assert_blocks_hold(got.visual[image.key], SIGNALS[name]["visual"], tau=0, temperatures=0)
        relation = got.relation[image.key]
        cosine = (relation.values * np.array(SIGNALS[name]["relation"])).sum()
        assert cosine >= 1 - 0.011
        assert relation.norm == SIGNALS[name]["norm"]
    assert got.hidden is not None
    expected = np.array([make_v2.hidden_state(row) for row in range(len(got.hidden))]).reshape(-1, 2)
    np.testing.assert_allclose(got.hidden, expected, atol=1 / 127)
    assert got.sequence is not None
    assert got.sequence.logprob == make_v2.SEQUENCE_LOGPROB * len(got.hidden)


def assert_blocks_hold(got: SparseRows, expected, *, tau: float, temperatures: int) -> None:
    """Rows as version 2 keeps them: probabilities in steps of their roots, scalars of ten bits."""
    assert got.num_rows == len(expected)
    for number, row in enumerate(expected):
        start, stop = got.offsets[number], got.offsets[number + 1]
        split = start + got.num_exact[number]
        assert got.ids[start] == next(iter(row["exact"]), got.ids[start])
        exact = dict(zip(got.ids[start:split].tolist(), np.exp(got.logprobs[start:split]).tolist(), strict=True))
        assert exact.keys() == row["exact"].keys()
        for token, p in row["exact"].items():
            assert exact[token] == pytest.approx(p, abs=0.04)
        assert got.ids[split:stop].tolist() == list(row["sampled"])
        draws = np.exp(got.logprobs[split:stop]) / max(tau, 1e-9)
        np.testing.assert_allclose(draws, list(row["sampled"].values()), rtol=1e-6)
        assert got.tail_mass[number] == pytest.approx(row["tail_mass"], rel=2**-11)
        assert got.entropy[number] == pytest.approx(row["entropy"], rel=2**-11)
        assert got.log_sum_exp[number].tolist() == pytest.approx([row["log_sum_exp"]] * temperatures, rel=2**-11)
        if "label_logprob" in row:
            assert got.label_logprob is not None
            assert got.label_logprob[number] == pytest.approx(row["label_logprob"], rel=2**-11)


@pytest.mark.parametrize("golden", [V1, V2, V3], ids=["v1", "v2", "v3"])
def test_pixels_of_older_versions_are_of_version_0(golden):
    identity = Cache.open(golden).identity
    assert identity.pixels is identity.image_processor is None
    assert stored_pixels(identity).version == 0
    assert "pixels" not in identity.model_dump_json()


@SINCE_2
def test_a_sealed_cache_of_an_older_version_takes_segments_of_the_present_one(tmp_path, golden):
    folder = shutil.copytree(golden, tmp_path / "cache")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    plan = {"plan_fingerprint": "another", "num_parts": 1}
    selection = {"response": {**make_v2.SELECTION["response"]}}
    identity = Identity(**{**make_v2.IDENTITY, **plan, "selection": selection})
    writer = CacheWriter.open(folder, identity, ("response",), append=True)
    assert writer.segment.format_version == 4
    old = Cache.open(golden, ("response",)).read(0)
    assert old.response is not None
    token = dataclasses.replace(
        old.tokens, sample_id="new", images=(), token_ids=np.array([1, 5, 20, 21, 30, 31], "i4")
    )
    writer.write_part(0, PartRecords(tokens=[token], response=[old.response]))
    writer.seal()
    assert verify(folder).problems == []
    got = Cache.open(folder, ("response",)).read(4).response
    assert got is not None
    assert got.ids.tolist() == old.response.ids.tolist()
    assert {path: path.read_bytes() for path in before} == before
