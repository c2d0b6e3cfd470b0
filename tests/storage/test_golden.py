"""Caches of every format version that was ever released stay readable, to the number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from storage.reader import Cache
from storage.rows import SparseRows
from storage.verify import verify
from tests.storage.golden.make_v1 import IDENTITY, IMAGES, PARTS, SIGNALS, TAU

V1 = Path(__file__).parent / "golden" / "v1"
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
