"""The roads that `benchmarks.dump` compares, each in a process of its own with one engine for all its repetitions.

`floor`: vLLM's bare prefill and one plain product with the head over the dump's rows. `prompt_logprobs`: vLLM's
own way to a prompt's top 64, its flat results written to Parquet as straightforwardly as can be.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPETITIONS = 3
TOP = 64
_CALL = 32  # prompts a call, as many as a dump gives its teacher


@dataclass(frozen=True)
class Road:
    """What one road took, by repetition."""

    seconds: list[float]
    num_tokens: int  # positions prefilled, visual ones included
    num_rows: int  # of the head
    parts: dict[str, list[float]]  # seconds of what it consists of


def floor(teacher: Path, source: Path) -> Road:
    """Prefill by the teacher's engine, and `hidden @ head^T` of the rows that a dump scores; nothing else."""
    import torch

    from teacher_dump.head import read_head
    from teacher_dump.vllm_teacher import VllmTeacher

    prepared, vocab_size = _prepared(teacher, source)
    engine = VllmTeacher(teacher, dtype="float32", max_length=512, settings={}, served=teacher.parent / "served")
    head = read_head(teacher, vocab_size=vocab_size)
    prefills, products = [], []
    num_tokens = num_rows = 0
    for _ in range(REPETITIONS + 1):
        rows: list[Any] = []
        num_tokens, seen = 0, set()
        started = time.perf_counter()
        for start in range(0, len(prepared), _CALL):
            batch = prepared[start : start + _CALL]
            for sample, states in zip(batch, engine.hidden_states([one.prompt for one in batch]), strict=True):
                num_tokens += len(states.hidden)
                rows.append(states.hidden[torch.from_numpy(sample.response_positions)])
                for image, (first, last) in zip(sample.record.images, sample.expansion.spans, strict=True):
                    if image.key not in seen:
                        seen.add(image.key)
                        rows.append(states.hidden[first:last])
        between = time.perf_counter()
        hidden = torch.cat(rows)
        num_rows = len(hidden)
        for chunk in hidden.split(1024):
            torch.matmul(chunk, head.weight.T)
        prefills.append(between - started)
        products.append(time.perf_counter() - between)
    return _road({"prefill": prefills[1:], "head": products[1:]}, num_tokens, num_rows)


def prompt_logprobs(teacher: Path, source: Path) -> Road:
    """Top 64 of every prompt position through vLLM's generate, and a Parquet file of lists."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from teacher_dump import checkpoint, torchvision_shim, vllm_teacher

    torchvision_shim.ensure()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm
    from vllm.logprobs import FlatLogprobs

    prepared, _ = _prepared(teacher, source)
    vllm_teacher.register_in_process(checkpoint.read_json(teacher / "config.json")["architectures"])
    engine = vllm.LLM(
        str(checkpoint.servable_view(teacher, into=teacher.parent / "served")),
        dtype="float32", max_model_len=512, enforce_eager=True, max_logprobs=TOP, enable_prefix_caching=False,
        kv_cache_memory_bytes=512 * 2**20,
    )  # fmt: skip
    sampling = vllm.SamplingParams(max_tokens=1, prompt_logprobs=TOP, flat_logprobs=True, detokenize=False)
    asking, writing = [], []
    num_tokens = num_rows = 0
    for _ in range(REPETITIONS + 1):
        started = time.perf_counter()
        spent, num_tokens, num_rows = 0.0, 0, 0
        for start in range(0, len(prepared), _CALL):
            batch = prepared[start : start + _CALL]
            prompts = [vllm_teacher.engine_prompt(sample.prompt) for sample in batch]
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
            before = time.perf_counter()
            ids, logprobs = [], []
            for sample, output in zip(batch, outputs, strict=True):
                num_tokens += len(output.prompt_token_ids or ())
                flat = output.prompt_logprobs
                assert isinstance(flat, FlatLogprobs)
                for position in sample.response_positions + 1:
                    places = slice(flat.start_indices[position], flat.end_indices[position])
                    ids.append(np.array(flat.token_ids[places], np.int32))
                    logprobs.append(np.array(flat.logprobs[places], np.float32))
            table = pa.table({"ids": pa.array(ids), "logprobs": pa.array(logprobs)})
            pq.write_table(table, teacher.parent / f"plain-{start}.parquet", compression="zstd")
            num_rows += len(ids)
            spent += time.perf_counter() - before
        asking.append(time.perf_counter() - started - spent)
        writing.append(spent)
    return _road({"generate": asking[1:], "write": writing[1:]}, num_tokens, num_rows)


def _prepared(teacher: Path, source: Path) -> tuple[Sequence[Any], int]:
    """All samples as a dump prepares them, and the size of the vocabulary."""
    from teacher_dump.dump import plan_dump, worker_settings
    from teacher_dump.worker import open_preparer

    settings = dump_settings(teacher, source, cache=teacher.parent / "unused")
    planned = plan_dump(settings)
    preparer = open_preparer(worker_settings(planned, settings))
    samples = [preparer.prepare(sample) for part in planned.plan.parts for sample in part.samples]
    return samples, planned.facts.vocab_size


def dump_settings(teacher: Path, source: Path, *, cache: Path, cpus: int = 2) -> Any:
    """The default dump of that teacher over that file."""
    from storage.config import CacheSection
    from teacher_dump.config import DataSection, DumpSection, SourceSection, TeacherSection
    from teacher_dump.dump import DumpSettings

    return DumpSettings(
        run=teacher.parent,
        data=DataSection(sources=(SourceSection(path=str(source)),)),
        teacher=TeacherSection(model=str(teacher), dtype="float32", max_length=512),
        dump=DumpSection(samples_per_part=64, cpus_per_actor=cpus),
        cache=CacheSection(path=str(cache)),
    )


def _road(parts: dict[str, list[float]], num_tokens: int, num_rows: int) -> Road:
    return Road([sum(each) for each in zip(*parts.values(), strict=True)], num_tokens, num_rows, parts)
