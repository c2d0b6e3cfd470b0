"""The golden cache reads to the numbers that it was written with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from storage.errors import CacheError
from storage.reader.cache import Cache
from storage.records.sample_key import SampleKey
from storage.records.sparse_rows import SparseRows
from storage.verify.scan_cache import verify
from tests.storage.golden.make_cache import (
    ADDED,
    HEAD,
    IDENTITY,
    PARTS,
    SELECTION,
    SEQUENCE_LOGPROB,
    SIGNALS,
    TAU,
    main,
    make_hidden_state,
)

GOLDEN = Path(__file__).parent / "golden" / "cache"


@pytest.fixture(scope="module", params=["kept", "written now"])
def golden(request, tmp_path_factory) -> Path:
    if request.param == "kept":
        return GOLDEN
    folder = tmp_path_factory.mktemp("golden") / "cache"
    main(str(folder))
    return folder


SAMPLES = [sample for part in PARTS for sample in part["samples"]]


def test_it_is_verified_and_opened_as_it_was_written(golden):
    report = verify(golden)
    assert report.problems == []
    assert report.notes == []
    assert report.sealed
    assert (report.num_segments, report.num_parts, report.num_samples, report.num_errors) == (2, 2, 4, 1)
    cache = Cache.open(golden)
    assert cache.families == ("tokens", "response", "visual", "relation", "sequence", "hidden")
    selection = {**SELECTION, **ADDED}
    assert {name: getattr(cache.identity, name) for name in IDENTITY} == {
        **IDENTITY,
        "selection": selection,
    }
    state = np.array([[1.0, -1.0]], np.float32)
    logits = state @ np.array([*HEAD, [0, 0]]).T * 0.25
    np.testing.assert_array_equal(cache.head().logits(state)[:, :3], logits)
    statistics = cache.statistics()
    assert set(statistics["errors_by_family"]) == {"response", "visual", "relation", "hidden"}
    assert statistics["teacher_noise"] == statistics["selection_errors"] == {}
    assert statistics["dropped_mass"]
    with pytest.raises(CacheError, match="stores no tail profile"):
        cache.tail_profile("response")


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_its_records_read_to_the_numbers_they_were_written_with(index, golden):
    sample, got = SAMPLES[index], Cache.open(golden).read(index, draw_set=3)
    assert got.tokens.key == SampleKey(sample["sample_id"], source=sample.get("source", 0))
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
    expected = np.array([make_hidden_state(row) for row in range(len(got.hidden))]).reshape(-1, 2)
    np.testing.assert_allclose(got.hidden, expected, atol=1 / 127)
    assert got.sequence is not None
    assert got.sequence.logprob == SEQUENCE_LOGPROB * len(got.hidden)


def assert_blocks_hold(got: SparseRows, expected, *, tau: float, temperatures: int) -> None:
    """Probabilities in steps of their roots, scalars of ten bits."""
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
