"""The roads that `benchmarks.dump` compares, each an engine in a process of its own, asked in turn.

`Floor`: vLLM's bare prefill and one plain product with the head over the rows of a dump; and the steps of a dump
one after another. `PromptLogprobs`: vLLM's own way to a prompt's top 64, its flat results written to Parquet as
straightforwardly as can be.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from storage.config import CacheSection
from storage.encoding.part_encoder import PartEncoder
from storage.processes import torchvision_shim
from storage.writer.cache_writer import CacheWriter
from teacher_dump.config import DataSection, DumpSection, SourceSection, TeacherSection
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.dump_plan import DumpPlan, plan_dump
from teacher_dump.prompts.preparation import PreparedSample
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.settings import DumpSettings
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.signals.loaded_teacher import LoadedTeacher
from teacher_dump.signals.scoring import PartScorer
from teacher_dump.teachers import hf_checkpoint as checkpoint
from teacher_dump.teachers import vllm_teacher
from teacher_dump.teachers.teacher import Teacher, TeacherStates
from teacher_dump.workers.worker import open_preparer, open_teacher

TOP = 64
MAX_LENGTH = 512
_CALL = 32  # prompts a call, as many as a dump gives its teacher


@dataclass(frozen=True)
class Road:
    """What one road took, once."""

    seconds: dict[str, float]  # of what it consists of
    num_tokens: int  # positions prefilled, visual ones included
    num_rows: int  # that were kept

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Floor:
    """The dump's own engine and head, without the dump."""

    def __init__(self, teacher: Path, source: Path) -> None:
        self.settings = dump_settings(teacher, source, cache=teacher.parent / "steps")
        self.planned = plan_dump(self.settings)
        self.worker = make_worker_settings(self.planned, self.settings)
        self.prepared = _prepared(self.planned, self.settings)
        opened = open_teacher(self.worker)
        self.engine: Teacher = opened.engine
        self.head: OutputHead = opened.head
        _ask(self.engine, self.prepared)  # the first calls of an engine are slow


def floor(state: Floor) -> Road:
    """Prefill of every whole prompt by vLLM, and `hidden @ head^T` of the rows that a dump scores; nothing else."""
    started = time.perf_counter()
    states = _ask(state.engine, state.prepared)
    prefilled = time.perf_counter()
    rows, seen = [], set[str]()
    for sample, each in zip(state.prepared, states, strict=True):
        rows.append(each.hidden[torch.from_numpy(sample.response_positions)])
        for image, positions in zip(sample.record.images, sample.expansion.visual, strict=True):
            if image.key not in seen:
                seen.add(image.key)
                rows.append(each.hidden[torch.from_numpy(positions)])
    hidden = torch.cat(rows)
    gathered = time.perf_counter()
    for chunk in hidden.split(1024):
        torch.matmul(chunk, state.head.weight.T)
    seconds = {"prefill": prefilled - started, "head": time.perf_counter() - gathered}
    return Road(seconds, sum(len(each.hidden) for each in states), len(hidden))


def steps(state: Floor) -> Road:
    """A dump in one process, step by step. Encoding and Parquet are measured before the writer does them again."""
    shutil.rmtree(state.settings.cache.path, ignore_errors=True)
    writer = CacheWriter.open(state.settings.cache.path, state.planned.identity, state.settings.cache.families)
    encoder = PartEncoder(state.planned.identity, writer.segment.stored_families, state.worker.zstd_level)
    clocked = _Clocked(state.engine)
    preparer = open_preparer(state.worker)
    scorer = PartScorer(preparer, state.worker.request, LoadedTeacher(clocked, state.head))
    clock = _Clock()
    num_tokens = num_rows = 0
    for part in state.planned.plan.parts:
        for sample in part.samples:
            preparer.prepare(sample)
        clock.lap("prompts and images")
        scored = scorer.score(part)
        clock.lap("score")
        families = encoder.encode(scored.records)
        clock.lap("encoding")
        for family, rows in families.items():
            encoder.to_parquet(family, rows)
        clock.lap("Parquet and compression")
        num_rows += sum(writer.write_part(part.number, scored.records).num_rows.values())
        clock.lap("write")
        num_tokens += scored.num_tokens
    took = clock.seconds
    twice = took["encoding"] + took["Parquet and compression"]
    seconds = {
        "prompts and images": took["prompts and images"],
        "prefill": clocked.seconds,
        "head, selection, relations": took["score"] - took["prompts and images"] - clocked.seconds,
        "encoding": took["encoding"],
        "Parquet and compression": took["Parquet and compression"],
        "hashes, disk, commit": took["write"] - twice,
    }
    return Road(seconds, num_tokens, num_rows)


class PromptLogprobs:
    """An engine of vLLM's that generates, with the same settings."""

    def __init__(self, teacher: Path, source: Path) -> None:
        torchvision_shim.import_torch_companions()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import vllm

        settings = dump_settings(teacher, source, cache=teacher.parent / "unused")
        self.prepared = _prepared(plan_dump(settings), settings)
        self.folder = teacher.parent / "plain"
        self.folder.mkdir(exist_ok=True)
        vllm_teacher.register_in_process(checkpoint.read_json(teacher / "config.json")["architectures"])
        self.engine = vllm.LLM(
            str(checkpoint.make_servable_view(teacher, into=teacher.parent / "served")),
            dtype="float32",
            max_model_len=MAX_LENGTH,
            enforce_eager=True,
            max_logprobs=TOP,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=512 * 2**20,
        )
        self.sampling = vllm.SamplingParams(
            max_tokens=1, prompt_logprobs=TOP, flat_logprobs=True, detokenize=False, temperature=0
        )
        prompts = [vllm_teacher.make_engine_prompt(sample.prompt) for sample in self.prepared[:_CALL]]
        self.engine.generate(prompts, self.sampling, use_tqdm=False)


def prompt_logprobs(state: PromptLogprobs) -> Road:
    """Top 64 of every prompt position through vLLM's generate, and of the answers a Parquet file of lists."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from vllm.logprobs import FlatLogprobs

    clock = _Clock()
    num_tokens = num_rows = 0
    for start in range(0, len(state.prepared), _CALL):
        batch = state.prepared[start : start + _CALL]
        prompts = [vllm_teacher.make_engine_prompt(sample.prompt) for sample in batch]
        outputs = state.engine.generate(prompts, state.sampling, use_tqdm=False)
        clock.lap("generate")
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
        pq.write_table(table, state.folder / f"{start:06d}.parquet", compression="zstd")
        num_rows += len(ids)
        clock.lap("decode and write")
    return Road(clock.seconds, num_tokens, num_rows)


def dump_settings(teacher: Path, source: Path, *, cache: Path, cpus: int = 2) -> DumpSettings:
    """The default dump of that teacher over that file."""
    return DumpSettings(
        run=teacher.parent,
        data=DataSection(sources=(SourceSection(path=str(source)),)),
        teacher=TeacherSection(model=str(teacher), dtype="float32", max_length=MAX_LENGTH),
        dump=DumpSection(cpus_per_actor=cpus),
        cache=CacheSection(path=str(cache)),
    )


def _prepared(planned: DumpPlan, settings: DumpSettings) -> list[PreparedSample]:
    """All samples as a dump prepares them."""
    preparer = open_preparer(make_worker_settings(planned, settings))
    return [preparer.prepare(sample) for part in planned.plan.parts for sample in part.samples]


def _ask(engine: Teacher, samples: Sequence[PreparedSample]) -> list[TeacherStates]:
    batches = [samples[start : start + _CALL] for start in range(0, len(samples), _CALL)]
    prompts = ([replace(sample.prompt, image_keys=()) for sample in batch] for batch in batches)  # sharing nothing
    return [states for batch in prompts for states in engine.hidden_states(batch)]


class _Clocked:
    """A teacher that knows how long it was asked."""

    def __init__(self, engine: Teacher) -> None:
        self._engine = engine
        self.seconds = 0.0

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        started = time.perf_counter()
        states = self._engine.hidden_states(prompts)
        self.seconds += time.perf_counter() - started
        return states


@dataclass
class _Clock:
    """Seconds by name, each lap from the one before."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
