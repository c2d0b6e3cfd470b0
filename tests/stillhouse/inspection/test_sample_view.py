"""What is shown of a sample is what the reader gives."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillhouse.inspection.sample_text import describe_label
from stillhouse.inspection.sample_view import (
    MAX_EXACT_SHOWN,
    MAX_SAMPLED_SHOWN,
    MIN_SHOWN,
    NUM_EXACT_ALWAYS,
    Alternative,
    AnswerToken,
    TokenSignal,
    build_sample_view,
    chart_bars,
    find_nearest_ids,
    find_sample,
    make_signals,
    summarise_relation,
)
from stillhouse.inspection.token_texts import TokenTexts
from storage.errors import ConfigError
from storage.reader.cache import Cache
from storage.records.records import RelationMatrix
from tests.storage.synthetic_cache import top_k, write_cache

IDS = TokenTexts(None, "ids")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder)
    return Cache.open(folder)


def test_each_token_shows_its_own_row(cache: Cache) -> None:
    num_sampled = num_hidden = 0
    for index in range(cache.num_samples):
        record = cache.read(index)
        rows = record.response
        assert rows is not None
        assert rows.label_logprob is not None
        tokens = build_sample_view(cache, index, IDS).tokens
        assert [token.token_id for token in tokens] == record.tokens.token_ids[record.tokens.response_mask].tolist()
        for row, token in enumerate(tokens):
            signal = token.signal
            assert signal is not None
            own = rows.slice(row, row + 1)
            split = int(own.num_exact[0])
            weights = np.exp(own.logprobs.astype(np.float64)).tolist()
            exact = dict(zip(own.ids[:split].tolist(), weights[:split], strict=True))
            sampled = dict(zip(own.ids[split:].tolist(), weights[split:], strict=True))
            shown = [entry for entry in signal.alternatives if not entry.sampled]
            drawn = [entry for entry in signal.alternatives if entry.sampled]
            falling = sorted(exact.values(), reverse=True)
            likely = [p for place, p in enumerate(falling) if place < NUM_EXACT_ALWAYS or p >= MIN_SHOWN]
            assert [entry.probability for entry in shown] == likely[:MAX_EXACT_SHOWN]
            num_hidden += len(exact) - len(shown)
            assert all(exact[entry.token_id] == entry.probability for entry in shown)
            assert all(sampled[entry.token_id] == entry.probability for entry in drawn)
            assert len(drawn) == min(len(sampled), MAX_SAMPLED_SHOWN)
            assert (signal.num_exact, signal.num_sampled) == (len(exact), len(sampled))
            total = sum(entry.probability for entry in shown) + signal.hidden_mass + signal.tail_mass
            assert total == pytest.approx(1, abs=1e-5)
            assert signal.entropy == rows.entropy[row]
            assert signal.label_logprob == rows.label_logprob[row]
            num_sampled += len(drawn)
    assert min(num_sampled, num_hidden) > 5  # the cache holds what is tested


def test_segments_are_the_conversation_in_order(cache: Cache) -> None:
    view = build_sample_view(cache, 3, IDS)  # ids 1, two images, 20 to 28; the answer is 20 and the last three
    assert [(segment.kind, segment.text) for segment in view.segments] == [
        ("prompt", "#1"),
        ("image", "1"),
        ("image", "2"),
        ("answer", "#20"),
        ("prompt", "#21 #22 #23 #24 #25"),
        ("answer", "#26 #27 #28"),
    ]
    assert [image.image for image in view.images] == list(cache.read(3).tokens.images)


def test_an_empty_answer_is_no_error(cache: Cache) -> None:
    view = build_sample_view(cache, 4, IDS)
    assert view.tokens == []
    assert view.mean_entropy is None


def test_images_say_how_many_samples_share_them(cache: Cache) -> None:
    for index in range(cache.num_samples):
        for image in build_sample_view(cache, index, IDS).images:
            shown = [{one.key for one in cache.read(i).tokens.images} for i in range(cache.num_samples)]
            assert image.num_sharing == sum(image.image.key in keys for keys in shown) >= 1


def test_without_response_rows_tokens_have_no_signal(tmp_path: Path) -> None:
    write_cache(tmp_path, families=("visual",))
    view = build_sample_view(Cache.open(tmp_path), 1, IDS)
    assert [token.signal for token in view.tokens] == [None] * 4
    assert view.images[0].relation is None
    assert view.images[0].visual is not None
    assert [len(signal.alternatives) <= 1 for signal in view.images[0].visual] == [True] * 4


def test_an_unknown_sample_is_answered_with_the_nearest_ids(cache: Cache) -> None:
    with pytest.raises(ConfigError, match=r"no sample 'sample-1-33' among 12; nearest: 'sample-1-3', "):
        find_sample(cache, "sample-1-33")


def test_a_sample_without_a_record_is_answered_with_the_reason(cache: Cache) -> None:
    with pytest.raises(ConfigError, match="'broken-1' has no record: image is truncated"):
        find_sample(cache, "broken-1")


def test_nearest_ids_among_none_and_among_two() -> None:
    assert find_nearest_ids("a", []) == []
    assert find_nearest_ids("zebra", ["ox", "zebu"]) == ["zebu", "ox"]


def test_a_misspelt_id_is_found_among_many() -> None:
    ids = [f"train-{part:03d}-{number:03d}" for part in range(40) for number in range(100)]
    for slip in ("trian-031-057", "train-031-057x", "train-31-057", "rain-031-057"):
        assert find_nearest_ids(slip, ids)[0] == "train-031-057"


def test_the_effective_rank_counts_equal_eigenvalues() -> None:
    for rank in (1, 2, 5):
        values = np.zeros((6, 6), np.float32)
        values[range(rank), range(rank)] = 1 / np.sqrt(rank)
        found = summarise_relation(RelationMatrix(values, 3.0))
        assert found.effective_rank == pytest.approx(rank, rel=1e-5)
        assert (found.smallest, found.norm, found.num_rows) == (0, 3.0, 6)


def test_improbable_alternatives_are_summed_beyond_the_first_two() -> None:
    logits = np.log(np.array([[0.9985, 0.0006, 0.0005, 0.0004], [0.6, 0.39, 0.0096, 0.0004]]))
    rows = top_k(logits, 4, labels=True)
    first, second = make_signals(rows, IDS, max_exact=MAX_EXACT_SHOWN)
    assert [entry.token_id for entry in first.alternatives] == [0, 1]
    assert first.hidden_mass == pytest.approx(0.0009, rel=1e-4)
    assert [entry.token_id for entry in second.alternatives] == [0, 1, 2]
    assert second.hidden_mass == pytest.approx(0.0004, rel=1e-4)


def test_a_label_has_one_probability_wherever_it_is_shown() -> None:
    """The exact one, though the stored entry is rounded; its row stands where that belongs."""
    entries = (Alternative(1, "a", 0.075, False), Alternative(2, "b", 0.073, False), Alternative(2, "b", 0.3, True))
    signal = TokenSignal(entries, 2, 1, 0.0, 0.852, 1.0, math.log(0.079))
    assert [(entry.text, round(shown, 6)) for entry, shown in signal.list_probabilities(2)] == [
        ("b", 0.079),
        ("a", 0.075),
        ("b", 0.3),
    ]
    token = AnswerToken(2, "b", signal)
    assert describe_label(signal).startswith("7.9 %")
    (label,) = [bar for bar in chart_bars(token) if bar.is_label and bar.kind == "exact"]
    assert label.fraction == pytest.approx(0.079)
    assert [shown for _, shown in signal.list_probabilities(9)] == [0.075, 0.073, 0.3]
    assert [shown for _, shown in replace(signal, label_logprob=None).list_probabilities(2)] == [0.075, 0.073, 0.3]
