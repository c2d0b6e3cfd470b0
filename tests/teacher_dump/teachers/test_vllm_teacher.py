"""Promise 8: the vLLM teacher and the transformers teacher write the same signals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from storage.reader.cache import Cache
from storage.records.sparse_rows import SparseRows
from storage.selection import Threshold, TopK
from teacher_dump.data.partition import Part
from teacher_dump.signals.spec import RowRequest, SignalRequest
from teacher_dump.teachers import hf_checkpoint as checkpoint
from teacher_dump.teachers.vllm_teacher import complete_shared_prefixes, extract_computed_states
from tests.teacher_dump.conftest import WriteConfig
from tests.teacher_dump.scorers import make_scorer, part_of, reference_teacher
from tests.tiny import make_tiny_llava

REPOSITORY = Path(__file__).parents[3]
TOLERANCE = 5e-5  # nats or probability, of what the cache keeps in float32; measured: 6e-6
ENTRY_TOLERANCE = 5e-3  # of a probability, relative: the cache keeps exact logprobs in float16
BATCHED_TOKENS = 48  # of the engine: prompts of 50 to 80 tokens are prefilled in two chunks


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def assert_close(one: SparseRows, other: SparseRows, *, tau: float | None) -> None:
    for name in ("tail_mass", "entropy"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=TOLERANCE)
    if one.label_logprob is not None or other.label_logprob is not None:
        assert one.label_logprob is not None
        assert other.label_logprob is not None
        np.testing.assert_allclose(one.label_logprob, other.label_logprob, atol=TOLERANCE)
    rows, others = ({(row, token): p for row, token, p in entries(kind)} for kind in (one, other))
    for key in rows.keys() ^ others.keys():  # only what sits on an edge may be in one and not in the other
        edge = tau if tau is not None else min(p for (row, _), p in others.items() if row == key[0])
        assert rows.get(key, others.get(key)) == pytest.approx(edge, rel=ENTRY_TOLERANCE)
    for key in rows.keys() & others.keys():
        assert rows[key] == pytest.approx(others[key], rel=ENTRY_TOLERANCE)


def entries(rows: SparseRows) -> list[tuple[int, int, float]]:
    """Exact entries as (row, token, probability)."""
    exact = rows.is_exact()
    return list(
        zip(
            rows.row_of_entry()[exact].tolist(),
            rows.ids[exact].tolist(),
            np.exp(rows.logprobs[exact].astype(np.float64)).tolist(),
            strict=True,
        )
    )


@pytest.mark.slow
@pytest.mark.ci
def test_both_teachers_write_the_same_signals(write_config: WriteConfig, tiny_data: Path, tmp_path: Path) -> None:
    """A whole dump through Ray and vLLM, against the reference in this process."""
    teacher = make_tiny_llava(tmp_path / "teacher", tied=True, head_dim=64, seed=1)
    settings = {"max_num_batched_tokens": BATCHED_TOKENS, "enable_chunked_prefill": True}
    config = write_config(
        teacher={"model": str(teacher), "backend": "vllm", "settings": settings},
        cache={"response": {"method": "topk", "k": 20, "rounding_kl": 0}, "visual": {"tau": 0.02, "rounding_kl": 0}},
    )
    done = run_python("-m", "teacher_dump", str(config))
    assert done.returncode == 0, done.stderr
    assert "INFO" not in done.stdout + done.stderr  # the engine's chatter is in the log
    (log,) = (tmp_path / "runs/tiny/logs").glob("teacher-*")
    assert "Initializing a V1 LLM engine" in log.read_text(encoding="utf-8", errors="replace")

    request = SignalRequest(
        response=RowRequest(TopK(20), 0), visual=RowRequest(Threshold(0.02), 0), relation_centered=False
    )
    scorer = make_scorer(teacher, tiny_data.parent, request, reference_teacher(teacher))
    samples = {sample.id: sample for sample in part_of(tiny_data).samples}
    cache = Cache.open(tmp_path / "cache")
    assert set(cache.sample_ids) == set(samples)
    assert cache.identity.engine.startswith("vllm ")
    longest = 0
    for index, sample_id in enumerate(cache.sample_ids):
        got = cache.read(index)
        scored = scorer.score(Part(0, (samples[sample_id],)))
        longest = max(longest, scored.num_tokens)
        (tokens,) = scored.records.tokens
        assert got.tokens.token_ids.tolist() == tokens.token_ids.tolist()
        assert got.tokens.response_mask.tolist() == tokens.response_mask.tolist()
        assert got.tokens.images == tokens.images
        assert scored.records.response is not None
        assert got.response is not None
        assert_close(got.response, scored.records.response[0], tau=None)
        for key, rows in (scored.records.visual or {}).items():
            assert_close(got.visual[key], rows, tau=0.02)
        for key, relation in (scored.records.relation or {}).items():
            assert got.relation[key].norm == pytest.approx(relation.norm, rel=1e-4)
            np.testing.assert_allclose(got.relation[key].values, relation.values, atol=1e-3)  # stored in float16
    assert longest > BATCHED_TOKENS
    summary = json.loads((tmp_path / "cache/dump.json").read_text(encoding="utf-8"))
    assert summary["tokens_per_s"] > 0


def test_states_that_were_not_computed_again_are_an_earlier_prompts() -> None:
    """By hand: rows are numbered, and a prompt's own ones come after those that it shares."""
    rows = torch.arange(40.0).reshape(20, 2)
    ids = [np.array(row) for row in ([5, 6, 7, 8], [5, 6, 7, 9, 4], [5, 6, 7, 9, 4, 3], [5, 6, 7, 8], [1, 6, 7])]
    computed = [rows[:4], rows[4:7], rows[7:9], rows[9:11], rows[11:13]]
    whole = complete_shared_prefixes(ids, ["a", "a", "a", "b", "a"], computed)
    first, second, third = (rows[places] for places in ([0, 1, 2, 3], [0, 1, 4, 5, 6], [0, 1, 4, 5, 7, 8]))
    for got, expected in zip(whole[:3], (first, second, third), strict=True):
        assert got is not None
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert whole[3:] == [None, None]  # of another family; of other tokens
    assert complete_shared_prefixes([], [], []) == []


def test_states_of_a_prompt_that_was_begun_again_are_not_taken() -> None:
    """vLLM's number of positions from its cache is the one of the first beginning."""

    for num_states, num_cached, is_taken in ((5, 0, 1), (2, 3, 1), (7, 0, 0), (4, 0, 0), (5, 3, 0), (0, 0, 0)):
        states = SimpleNamespace(data=torch.ones(num_states, 2))
        output = SimpleNamespace(outputs=states, prompt_token_ids=[1] * 5, num_cached_tokens=num_cached)
        assert (extract_computed_states(output) is not None) == is_taken, (num_states, num_cached)


@pytest.mark.slow
def test_a_call_that_fails_costs_the_engine_nothing(tiny_teacher: Path, tmp_path: Path) -> None:
    """Its short form, with an engine in small, is in test_device_failure."""
    done = run_python("-m", "tests.teacher_dump.engine_calls", str(tiny_teacher), str(tmp_path / "served"))
    assert done.returncode == 0, done.stderr
    length = 24  # tokens of a prompt with one picture
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "one": [length],
        "two pictures": "PromptRefusedError",
        "mixed": "PromptRefusedError",
        "after mixed": [length],
        "also after mixed": [length] * 3,
        "too long": "PromptRefusedError",
        "no tokens": "PromptRefusedError",
        "no such token": "PromptRefusedError",
        "a picture without a place": "AssertionError",
        "all": [length] * 10,
    }


@pytest.mark.slow
@pytest.mark.ci
def test_settings_that_vllm_does_not_have_are_refused_by_name() -> None:
    code = (
        "from storage.errors import ConfigError\n"
        "from storage.processes import torchvision_shim; torchvision_shim.import_torch_companions()\n"
        "from teacher_dump.teachers.vllm_teacher import check_settings\n"
        "check_settings({'tensor_parallel_size': 2, 'max_num_seqs': 8})\n"
        "for name in ('tensor_paralel_size', 'max_model_len', 'runner', 'hf_overrides'):\n"
        "    try: check_settings({name: 1})\n"
        "    except ConfigError as error: print(error)\n"
    )
    done = run_python("-c", code)
    unknown, ours, fixed, outside = done.stdout.splitlines()[-4:]
    assert unknown.startswith("teacher.settings.tensor_paralel_size: vLLM has no such setting; did you mean tensor_par")
    assert "set teacher.max_length" in ours
    assert "runner: is set by the dump" in fixed
    assert "hf_overrides: is set by the dump; change a copy of the checkpoint" in outside


def test_the_plain_names_of_transformers_5_are_what_the_view_is_for(tiny_teacher: Path, tmp_path: Path) -> None:
    """If transformers goes back to nested names the view is never made, and this test says so."""
    names = checkpoint.map_tensor_files(tiny_teacher)
    assert any(name.startswith("vision_tower.encoder.") for name in names)
    view = checkpoint.make_servable_view(tiny_teacher, into=tmp_path)
    assert any(name.startswith("vision_tower.vision_model.encoder.") for name in checkpoint.map_tensor_files(view))
