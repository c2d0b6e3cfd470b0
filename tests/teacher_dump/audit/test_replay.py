"""Replay of a cache with its teacher: good caches pass, and every kind of fault is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from stillhouse.__main__ import main
from storage.errors import CacheError, IdentityError, StillhouseError
from storage.records.records import PartRecords
from storage.records.sparse_rows import SparseRows
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from teacher_dump.audit.comparison import Measurement
from teacher_dump.audit.replay import NOISE_FACTOR, Replay, check_drift, replay, summarize_drifts
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import DumpSettings, read_settings
from teacher_dump.workers.worker import open_scorer
from tests.teacher_dump.conftest import WriteConfig

FAMILIES = ["response", "visual", "relation", "hidden"]
NUM_SAMPLES = 24
Change = Callable[[PartRecords], PartRecords]


def dump_changed(settings: DumpSettings, change: Change = lambda records: records, **identity: Any) -> None:
    """Dumps with the same teacher and changes the records before they are written: the cache still verifies."""
    planned = plan_dump(settings)
    worker = make_worker_settings(planned, settings)
    scorer = open_scorer(worker)
    assert scorer.teacher is not None
    writer = CacheWriter.open(worker.cache, planned.identity.model_copy(update=identity), worker.families)
    if "hidden" in worker.families:
        writer.put_head(scorer.teacher.head.stored())
    for part in planned.plan.parts:
        writer.write_part(part.number, change(scorer.score(part).records))
    writer.seal()
    assert verify(worker.cache).problems == []


def replay_cache(settings: DumpSettings, *, num_samples: int = NUM_SAMPLES) -> Replay:
    return replay(settings, settings.cache.path, num_samples=num_samples, seed=0)


def list_drifted(found: Replay, family: str) -> set[str]:
    return {sample_id for one in found.drifts if one.family == family for sample_id in one.samples}


@pytest.mark.parametrize(
    ("section", "families"),
    [
        ({}, [*FAMILIES, "sequence"]),
        ({"response": {"rounding_kl": 0}, "relation": {"encoding": "low_rank"}}, FAMILIES),
        ({"response": {"method": "topk", "k": 8}, "relation": {"encoding": "pooled"}}, FAMILIES),
        ({"response": {"method": "sampled"}, "hidden": {"encoding": "int8"}}, ["response", "hidden"]),
    ],
)
def test_an_unchanged_cache_shows_no_drift(write_config: WriteConfig, section, families):
    settings = read_settings(write_config(cache={"families": families, **section}))
    dump_changed(settings)
    found = replay_cache(settings)
    assert {one.family for one in found.drifts} == set(families)
    assert found.ok, found
    assert found.num_samples == NUM_SAMPLES
    for one in found.drifts:
        assert one.noise.max <= 1e-6  # this teacher takes one prompt at a time
        assert one.excess.max == 0
    check_drift(found, "cache")


@pytest.mark.parametrize(("factor", "is_drift"), [(0.9, False), (1.1, True)])
def test_the_documented_multiple_of_the_noise_is_allowed_and_no_more(factor, is_drift):
    noise, zero = np.array([0.0, 2e-3]), np.zeros(2)
    allowed = np.full(2, 1e-2)  # by the encoding
    drift = allowed + np.array([0.0, factor * NOISE_FACTOR * 2e-3])
    log_output = [
        Measurement(f"log_output {number}", "response", "entropy", zero, zero, allowed) for number in range(9)
    ]
    (found,) = summarize_drifts([*log_output, Measurement("s", "response", "entropy", noise, drift, allowed)])
    assert found.samples == (("s",) if is_drift else ())
    page = (Path(__file__).parents[3] / "docs" / "commands.md").read_text(encoding="utf-8")
    assert f"{NOISE_FACTOR:g} times the largest difference between the two scorings" in " ".join(page.split())


def swap_answers(records: PartRecords) -> PartRecords:
    """Swaps the rows of two samples of the same length."""
    assert records.response is not None
    first, second = find_same_tokens(records)
    response = list(records.response)
    response[first], response[second] = response[second], response[first]
    return replace(records, response=response)


def find_same_tokens(records: PartRecords) -> tuple[int, int]:
    """Returns two samples of the same tokens with different images, which a stale prefix would confuse."""
    for first, one in enumerate(records.tokens):
        for second, other in enumerate(records.tokens[:first]):
            same = len(one.token_ids) == len(other.token_ids) and one.images[0].key != other.images[0].key
            if same and np.array_equal(one.response_mask, other.response_mask):
                return first, second
    raise AssertionError("no such pair")


def shift_rows(records: PartRecords) -> PartRecords:
    """Shifts one sample's rows by a token, as if an engine's missing first logprob were skipped."""
    assert records.response is not None
    rows = records.response[0]
    late = SparseRows.concatenate([rows.slice(0, 1), rows.slice(0, rows.num_rows - 1)])
    return replace(records, response=[late, *records.response[1:]])


def swap_images(records: PartRecords) -> PartRecords:
    """Swaps visual rows and relation matrices of two images."""
    assert records.visual is not None
    assert records.relation is not None
    first, second = list(records.visual)[:2]
    visual = {**records.visual, first: records.visual[second], second: records.visual[first]}
    relation = {**records.relation, first: records.relation[second], second: records.relation[first]}
    return replace(records, visual=visual, relation=relation)


def roll_hidden(records: PartRecords) -> PartRecords:
    assert records.hidden is not None
    return replace(records, hidden=[np.roll(records.hidden[0], 1, axis=0), *records.hidden[1:]])


def list_different(one: PartRecords, other: PartRecords) -> set[str]:
    """Returns the samples whose rows are not the same objects."""

    def parts(records: PartRecords, at: int) -> list[Any]:
        assert records.response is not None
        assert records.hidden is not None
        assert records.visual is not None
        images = [records.visual[image.key] for image in records.tokens[at].images]
        return [records.response[at], records.hidden[at], *images]

    return {
        record.sample_id
        for at, record in enumerate(one.tokens)
        if any(before is not after for before, after in zip(parts(one, at), parts(other, at), strict=True))
    }


@pytest.mark.parametrize(
    ("change", "families"),
    [
        (swap_answers, {"response"}),
        (shift_rows, {"response"}),
        (swap_images, {"visual", "relation"}),
        (roll_hidden, {"hidden"}),
    ],
)
def test_rows_that_are_not_the_samples_own_are_found(write_config: WriteConfig, change: Change, families):
    """The cache verifies, and those samples are named whose records were changed, no other."""
    settings = read_settings(write_config(cache={"families": FAMILIES}, dump={"samples_per_part": 24}))
    changed: set[str] = set()

    def noted(records: PartRecords) -> PartRecords:
        after = change(records)
        changed.update(list_different(records, after))
        return after

    dump_changed(settings, noted)
    found = replay_cache(settings)
    assert 0 < len(changed) < NUM_SAMPLES / 2
    for family in FAMILIES:
        assert list_drifted(found, family) == (changed if family in families else set()), (family, found)
    with pytest.raises(StillhouseError, match=rf"{next(iter(families))} .* from the teacher.*samples train-"):
        check_drift(found, "cache")


def test_another_teacher_under_the_same_fingerprint_is_found(
    write_config: WriteConfig, tiny_teacher: Path, tmp_path: Path
):
    """A few weights of one layer were a hundredth off when the cache was made, and its fingerprint is faked."""
    other = shutil.copytree(tiny_teacher, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
    weights[name][:8] += 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    made = read_settings(write_config(cache={"families": FAMILIES}, teacher={"model": str(other)}))
    settings = read_settings(write_config(cache={"families": FAMILIES}))
    right = plan_dump(settings).identity.teacher_fingerprint
    dump_changed(made, teacher_fingerprint=right)
    with pytest.raises(IdentityError, match=rf"teacher_fingerprint: cache has '{right}', this run has"):
        replay_cache(made)
    found = replay_cache(settings)
    for family in FAMILIES:
        assert list_drifted(found, family), (family, found)


def test_a_teacher_of_another_dtype_is_refused(write_config: WriteConfig):
    dump_changed(read_settings(write_config(cache={"families": ["response"]})))
    with pytest.raises(IdentityError, match="dtype: cache has 'float32', this run has 'bfloat16'"):
        replay_cache(read_settings(write_config(teacher={"dtype": "bfloat16"})))


def test_images_are_read_where_the_cache_says(write_config: WriteConfig, tiny_data: Path, tmp_path: Path):
    """The file may name other data by now, or the images may have moved with it."""
    data = shutil.copytree(tiny_data.parent, tmp_path / "data")
    sources = {"sources": [{"path": str(data / tiny_data.name)}]}
    dump_changed(read_settings(write_config(cache={"families": ["response"]}, data=sources)))
    (tmp_path / "text.jsonl").write_text(
        '{"id": "t", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "red"}]}'
    )
    other = {"sources": [{"path": str(tmp_path / "text.jsonl")}]}
    assert replay_cache(read_settings(write_config(data=other)), num_samples=3).ok
    data.rename(tmp_path / "moved")
    moved = {"sources": [{"path": str(tmp_path / "moved" / tiny_data.name)}]}
    assert replay_cache(read_settings(write_config(data=moved)), num_samples=3).ok


def test_a_changed_image_is_reported(write_config: WriteConfig, tiny_data: Path, tmp_path: Path):
    data = shutil.copytree(tiny_data.parent, tmp_path / "data")
    sources = {"sources": [{"path": str(data / tiny_data.name)}]}
    settings = read_settings(write_config(cache={"families": ["response"]}, data=sources))
    dump_changed(settings)
    image = sorted((data / "images").iterdir())[0]
    shutil.copy(sorted((data / "images").iterdir())[1], image)
    found = replay_cache(settings)
    assert {error.sample_id for error in found.refused} == {"train-0000", "train-0008", "train-0016"}
    assert not found.ok
    with pytest.raises(StillhouseError, match=r"train-0008: cannot be scored again: image .* has the sha256"):
        check_drift(found, "cache")


def test_the_command_reports_drift_and_exits_1(write_config: WriteConfig, tmp_path: Path, capsys):
    path = write_config(cache={"families": ["response"]})
    dump_changed(read_settings(path))
    command = ["verify", str(tmp_path / "cache"), "--replay", "5", str(path)]
    assert main(command) == 0
    assert "total_variation" in capsys.readouterr().out
    assert main([*command, "--json", "--seed", "3", "teacher.max_length=100"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["replay"]
    assert (found["num_samples"], found["seed"]) == (5, 3)
    assert [one["measure"] for one in found["drifts"]][:2] == ["label_logprob", "entropy"]
    shutil.rmtree(tmp_path / "cache")
    dump_changed(read_settings(path), shift_rows)
    assert main([*command[:2], "--replay", "24", str(path)]) == 1
    assert "dump the cache again" in capsys.readouterr().err
    assert main([*command[:2], str(path)]) == 2
    assert "for --replay" in capsys.readouterr().err
    assert main([*command[:2], "--replay", "0", str(path)]) == 2
    assert main([*command, "teacher.dtype=bfloat16"]) == 2
    assert "dtype: cache has 'float32'" in capsys.readouterr().err


@pytest.mark.parametrize(("mean", "is_drift"), [(0.9e-2, False), (1.1e-2, True)])
def test_a_mean_kl_beyond_the_absolute_limit_is_drift_whatever_the_noise(mean, is_drift):
    noisy, zero = np.full(4, 1.0), np.zeros(4)
    far = Measurement("far", "response", "kl", noisy, np.full(4, 2 * mean), zero)
    near = Measurement("near", "response", "kl", noisy, zero, zero)
    (found,) = summarize_drifts([far, near], max_kl=1e-2)
    assert found.samples == (("far",) if is_drift else ())
    assert found.limit == 1e-2
    if is_drift:
        with pytest.raises(
            StillhouseError, match=r"kl: 0.011 nats a row .* check.max_engine_kl allows 0.01; samples far"
        ):
            check_drift(Replay(0, 2, ("vllm 1", "vllm 1"), (found,), ()), "cache")


def test_another_engine_is_held_to_the_absolute_limit_alone(
    write_config: WriteConfig, tiny_teacher: Path, tmp_path: Path
):
    """A cache that vLLM made is replayed with transformers, whose own noise is zero."""
    slightly = shutil.copytree(tiny_teacher, tmp_path / "slightly")
    weights = load_file(slightly / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
    weights[name] *= 1.01
    save_file(weights, slightly / "model.safetensors", metadata={"format": "pt"})
    config = write_config(cache={"families": FAMILIES})
    settings = read_settings(config)
    right = plan_dump(settings).identity.teacher_fingerprint
    made = read_settings(config, [f"teacher.model={slightly}"])
    dump_changed(made, teacher_fingerprint=right, engine="vllm 0.1")
    found = replay_cache(settings)
    assert found.ok, found
    by_measure = {(one.family, one.measure): one for one in found.drifts}
    assert by_measure["response", "total_variation"].drift.max > 1e-3
    for family in ("response", "visual", "hidden"):
        one = by_measure[family, "kl"]
        assert one.noise.max < 1e-6
        assert 1e-6 < one.drift.mean < 1e-2, one
    strict = read_settings(config, ["check.max_engine_kl=1e-7"])
    with pytest.raises(StillhouseError, match=r"hidden kl: .* check.max_engine_kl allows 1e-07"):
        check_drift(replay_cache(strict), "cache")
    shutil.rmtree(tmp_path / "cache")
    dump_changed(made, teacher_fingerprint=right)  # by the same engine: the noise is the limit
    assert not replay_cache(settings).ok


def test_rows_of_another_engine_that_are_shifted_are_found(write_config: WriteConfig):
    settings = read_settings(write_config(cache={"families": ["response"]}, dump={"samples_per_part": 1}))
    dump_changed(settings, shift_rows, engine="vllm 0.1")
    with pytest.raises(StillhouseError, match=r"response kl: .* nats a row from the teacher in the mean"):
        check_drift(replay_cache(settings), "cache")


def test_another_engine_without_rows_to_compare_is_refused(write_config: WriteConfig):
    settings = read_settings(write_config(cache={"families": ["relation"]}))
    dump_changed(settings, engine="vllm 0.1")
    with pytest.raises(CacheError, match=r"was made by vllm 0\.1, and holds none of response, visual, hidden"):
        replay_cache(settings)
