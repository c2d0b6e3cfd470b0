"""A cache that does not fit is refused with field, both values and what to do, before it is read."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest

from storage.errors import CacheError, CorruptPartError, IdentityError
from storage.identity import FORMAT_VERSION
from storage.reader.cache import Cache, read_identity
from student_train.config import StageSection
from student_train.losses.config import LossesSection
from student_train.training.stage_data import prepare_stage_data, read_fitting_checkpoint
from tests.student_train.caches import make_cache

LIMIT_S = 60.0  # it takes under a second on an idle machine; that no rows are read is tested below, without a clock


def stage(checkpoint: Path, *losses: str, **fields: object) -> StageSection:
    sections = LossesSection.model_validate({name: {} for name in losses})
    return StageSection.model_validate({"init": str(checkpoint), "steps": 1, "losses": sections, **fields})


def rewrite_version(cache: Path, version: int) -> None:
    """Write an identity as a later Stillhouse version would, with its hash."""
    document = json.loads((cache / "cache.json").read_text())
    del document["sha256"]
    document["format_version"] = version
    spelt = json.dumps(document, sort_keys=True, indent=1) + "\n"
    document["sha256"] = hashlib.sha256(spelt.encode()).hexdigest()
    (cache / "cache.json").write_text(json.dumps(document, sort_keys=True, indent=1) + "\n")


@pytest.fixture(scope="module")
def warm(checkpoint: Path, cache: Path) -> Path:
    """The checkpoint, after everything that its first use imports has been imported."""
    prepare_stage_data(stage(checkpoint, "response", "visual"), str(cache))
    return checkpoint


@pytest.mark.parametrize(
    ("identity_fields", "words"),
    [
        ({"tokenizer_fingerprint": "f" * 64}, ("tokenizer_fingerprint: the cache has " + "f" * 64, "{fingerprint}")),
        ({"vocab_size": 350}, ("vocab_size: the cache has 350", " has 300", "the head of", "320 rows")),
        ({"tokens_per_image": 10}, ("visual grid: the cache has 10 visual tokens", "this student has 16")),
    ],
)
def test_a_misfit_is_reported_with_both_values_within_a_second(
    warm: Path, cache: Path, tmp_path: Path, identity_fields: dict, words: tuple[str, ...]
) -> None:
    path = make_cache(tmp_path, warm, num_samples=4, **identity_fields)
    started = time.perf_counter()
    with pytest.raises(IdentityError) as caught:
        prepare_stage_data(stage(warm, "response", "visual"), str(path))
    seconds = time.perf_counter() - started
    fingerprint = read_identity(cache).tokenizer_fingerprint
    for word in words:
        assert word.format(fingerprint=fingerprint) in str(caught.value)
    assert "give it the teacher's tokenizer" in str(caught.value) or "take a student" in str(caught.value)
    assert seconds < LIMIT_S


def test_an_unknown_format_version_is_refused_within_a_second(warm: Path, tmp_path: Path) -> None:
    path = make_cache(tmp_path, warm, num_samples=4)
    rewrite_version(path, 99)
    for opens in (lambda: prepare_stage_data(stage(warm), str(path)), lambda: Cache.open(path)):
        started = time.perf_counter()
        with pytest.raises(
            CacheError, match=rf"format version is 99, this Stillhouse reads {FORMAT_VERSION}; read it with"
        ):
            opens()
        assert time.perf_counter() - started < LIMIT_S


def test_a_misfit_is_found_without_the_index(warm: Path, tmp_path: Path) -> None:
    """Token files that the index would read are missing, so the time does not depend on the cache's size."""
    path = make_cache(tmp_path / "grid", warm, num_samples=4, tokens_per_image=10)
    for file in (path / "tokens").glob("part-00001.*"):
        file.unlink()
    with pytest.raises(IdentityError, match="visual grid"):
        read_fitting_checkpoint(stage(warm, "relation"), str(path))
    path = make_cache(tmp_path / "tokenizer", warm, num_samples=4, tokenizer_fingerprint="0" * 64)
    for file in (path / "tokens").iterdir():
        file.unlink()
    with pytest.raises(IdentityError, match="tokenizer_fingerprint"):
        read_fitting_checkpoint(stage(warm, "relation"), str(path))
    with pytest.raises(CorruptPartError):
        Cache.open(path)
