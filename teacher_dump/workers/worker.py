"""A worker: one process's teacher, which scores parts and commits them to the cache.

Several threads may submit parts at once, which then overlap: while the teacher scores one part, another is encoded,
compressed and written, and the first samples of a third are decoded. Each of the three steps has one thread.
"""

from __future__ import annotations

import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from storage.errors import ConfigError
from storage.identity import Identity
from storage.images.settings import PixelSettings
from storage.layout.documents import Commit
from storage.processes.waiting import Waiting
from storage.writer.cache_writer import CacheWriter
from teacher_dump.config import TooLong
from teacher_dump.data.partition import Part
from teacher_dump.data.sample import Sample
from teacher_dump.prompts.image_tokens import VisualGrid
from teacher_dump.prompts.preparation import Preparer
from teacher_dump.prompts.preprocessor import PromptBuilder
from teacher_dump.prompts.processor import load_processor
from teacher_dump.signals.loaded_teacher import LoadedTeacher
from teacher_dump.signals.pixel_check import check_pixel_values
from teacher_dump.signals.scoring import Chunk, PartScorer, ScoredPart
from teacher_dump.signals.spec import SignalRequest
from teacher_dump.signals.vision_check import check_vision
from teacher_dump.teachers.fingerprint import ProcessorFacts
from teacher_dump.teachers.teacher import Generator, Teacher

if TYPE_CHECKING:
    from teacher_dump.teachers.transformers_teacher import TransformersTeacher

REFERENCE = "reference"  # a backend: transformers in the place of another engine, with that engine's settings
T = TypeVar("T")


@dataclass(frozen=True)
class WorkerSettings:
    """All settings of a worker, as plain values that can be sent to another process."""

    checkpoint: Path
    backend: str  # vllm, transformers or REFERENCE
    dtype: str
    max_length: int  # tokens, visual tokens included
    engine_settings: dict[str, Any]
    served: Path  # folder for views of the checkpoint
    facts: ProcessorFacts
    image_root: Path
    request: SignalRequest
    cache: str  # folder or URL
    identity: Identity
    families: tuple[str, ...]
    append: bool
    zstd_level: int
    rows_per_chunk: int  # of logits in memory at once
    check_samples: tuple[Sample, ...]  # for the vision check; none: no check
    too_long: TooLong = "refuse"
    template_arguments: dict[str, Any] = field(default_factory=dict)  # of the chat template


OpenEngine = Callable[[WorkerSettings], Teacher]


@dataclass(frozen=True)
class PartOutcome:
    """Counts and times of one finished part."""

    part: int
    num_samples: int  # with a record
    num_errors: int
    num_tokens: int  # positions that the teacher scored; 0 if the part was committed before
    num_bytes: int  # of the part's files
    started: float  # seconds since the epoch: scoring began
    finished: float  # the part was committed
    peak_memory_bytes: int  # of the worker's process so far
    num_cut: int = 0  # samples with a record that were too long to keep whole


class Worker:
    """Scores and commits parts. Loads its teacher and runs the vision check with the first part.

    Invariant: one thread uses the teacher, one prepares prompts and images, and one part is written at a time.
    So memory holds at most a part that is written, one that is scored, and two chunks of samples.
    """

    def __init__(self, settings: WorkerSettings, *, open_engine: OpenEngine | None = None) -> None:
        """`open_engine` loads the teacher's engine; by default the backend of the settings."""
        self._settings = settings
        self._open_engine = open_engine or _open_engine
        self._writer = CacheWriter.open(
            settings.cache,
            settings.identity,
            settings.families,
            append=settings.append,
            zstd_level=settings.zstd_level,
        )
        self._scorer: PartScorer | None = None
        self._open_lock = threading.Lock()
        self._teacher_thread = ThreadPoolExecutor(1, "teacher")
        self._prompt_thread = ThreadPoolExecutor(1, "samples")
        self._write_lock = threading.Lock()
        self._changed = threading.Condition()
        self._num_unwritten = 0  # parts that are scored and not yet committed
        self._num_written = 0

    def run(self, part: Part) -> PartOutcome:
        """Scores a part and commits it; does nothing if it is committed already.

        Raises StillhouseError if the teacher cannot be used, or the cache cannot be written.
        """
        started = time.time()
        commit = self._writer.commit_of(part.number)
        if commit is not None:
            return _make_outcome(part, commit, None, started)
        with self._open_lock:
            if self._scorer is None:
                self._scorer = self._teacher_thread.submit(self._open_scorer).result()
        started = time.time()
        chunks = prefetch(self._scorer.prepare_chunks(part), self._prompt_thread)
        scored = self._teacher_thread.submit(self._score, part, chunks).result()
        try:
            with self._write_lock:
                commit = self._writer.write_part(part.number, scored.records)
                self._num_written += 1
        finally:
            with self._changed:
                self._num_unwritten -= 1
                self._changed.notify_all()
        return _make_outcome(part, commit, scored, started)

    def finish_writing(self, *, limit_s: float) -> int:
        """Waits until all scored parts are committed or have failed; returns how many this worker has committed.

        For a process that is about to end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._num_unwritten == 0, timeout=limit_s)
            return self._num_written

    def _score(self, part: Part, chunks: Iterator[Chunk]) -> ScoredPart:
        assert self._scorer is not None
        scored = self._scorer.score(part, chunks)
        with self._changed:  # in the teacher's thread, so that it is counted before a later part can fail
            self._num_unwritten += 1
        return scored

    @property
    def is_open(self) -> bool:
        """Whether the teacher is loaded."""
        return self._scorer is not None

    def _open_scorer(self) -> PartScorer:
        with Waiting("the teacher to load"):
            scorer = open_scorer(self._settings, self._open_engine)
        if scorer.teacher is not None and self._settings.request.hidden_limit is not None:
            self._writer.put_head(scorer.teacher.head.stored())
        return scorer


def _make_outcome(part: Part, commit: Commit, scored: ScoredPart | None, started: float) -> PartOutcome:
    """Makes a part's outcome. `scored` is None if the part had been committed before."""
    return PartOutcome(
        part=part.number,
        num_samples=commit.num_samples,
        num_errors=len(commit.errors if scored is None else scored.records.errors),
        num_tokens=0 if scored is None else scored.num_tokens,
        num_bytes=sum(entry.file_bytes for entry in commit.families.values()),
        started=started,
        finished=time.time(),
        peak_memory_bytes=measure_peak_memory(),
        num_cut=0 if scored is None else scored.num_cut,
    )


def prefetch(items: Iterator[T], executor: Executor) -> Iterator[T]:
    """Yields the items; the executor computes the next one in advance, the first starting with this call."""
    made = executor.submit(next, items, None)

    def prefetched_items() -> Iterator[T]:
        future = made
        while (item := future.result()) is not None:
            future = executor.submit(next, items, None)
            yield item

    return prefetched_items()


def measure_peak_memory() -> int:
    """Returns the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts kibibytes


def _check_pooling(grid: VisualGrid) -> None:
    num_tokens = grid.count_fixed_tokens()
    if num_tokens is None or math.isqrt(num_tokens) ** 2 != num_tokens:
        laid = "lays out visual tokens by an image's size" if num_tokens is None else f"has {num_tokens} visual tokens"
        raise ConfigError(
            f"cache.relation.pool: averages over blocks of a square grid, but this teacher {laid}; leave it out"
        )


def open_preparer(settings: WorkerSettings) -> Preparer:
    """Loads the teacher's processor, no weights. Raises ConfigError if relation matrices cannot be pooled."""
    facts = settings.facts
    trust = bool(settings.engine_settings.get("trust_remote_code", False))
    processor = load_processor(settings.checkpoint, trust_remote_code=trust)
    grid = VisualGrid(processor, facts.image_token_id)
    if settings.request.relation_pool is not None and facts.image_token_id >= 0:
        _check_pooling(grid)
    return Preparer(
        prompts=PromptBuilder(
            processor,
            image_token_id=facts.image_token_id,
            eos_token_ids=facts.eos_token_ids,
            template_arguments=settings.template_arguments,
        ),
        grid=grid,
        image_token_id=facts.image_token_id,
        preprocessing_fingerprint=facts.image_preprocessing_fingerprint,
        pixels=facts.pixels or PixelSettings(),
        image_root=settings.image_root,
        max_length=settings.max_length,
        too_long=settings.too_long,
    )


def open_scorer(settings: WorkerSettings, open_engine: OpenEngine | None = None) -> PartScorer:
    """Returns a scorer whose loaded teacher passed its checks. Raises StillhouseError if it cannot be used."""
    preparer = open_preparer(settings)
    teacher = open_teacher(settings, open_engine) if settings.request.needs_teacher else None
    scorer = PartScorer(preparer, settings.request, teacher)
    if teacher is not None and settings.check_samples:
        check_vision(scorer, teacher.head, settings.check_samples, pixels=settings.facts.pixels)
        _check_pixel_values(settings, scorer, teacher)
    return scorer


def _check_pixel_values(settings: WorkerSettings, scorer: PartScorer, teacher: LoadedTeacher) -> None:
    trust = bool(settings.engine_settings.get("trust_remote_code", False))
    check_pixel_values(
        teacher.engine,
        load_processor(settings.checkpoint, trust_remote_code=trust),
        scorer.prepare(settings.check_samples).ready,
        image_token_id=settings.facts.image_token_id,
    )


def open_teacher(settings: WorkerSettings, open_engine: OpenEngine | None = None) -> LoadedTeacher:
    """Loads the engine and the output head; the head goes to the GPU if there is one."""
    import torch

    from teacher_dump.signals.lm_head import read_head

    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = read_head(
        settings.checkpoint,
        vocab_size=settings.facts.vocab_size,
        device=device,
        rows_per_chunk=settings.rows_per_chunk,
    )
    return LoadedTeacher((open_engine or _open_engine)(settings), head)


def open_generator(settings: WorkerSettings) -> Generator:
    """Loads the engine that generates answers."""
    if settings.backend != "vllm":
        return _load_transformers(settings)
    from teacher_dump.teachers.vllm_teacher import VllmGenerator

    return VllmGenerator(settings.checkpoint, **_vllm_options(settings))


def _open_engine(settings: WorkerSettings) -> Teacher:
    if settings.backend != "vllm":
        return _load_transformers(settings)
    from teacher_dump.teachers.vllm_teacher import VllmTeacher

    return VllmTeacher(settings.checkpoint, **_vllm_options(settings))


def _vllm_options(settings: WorkerSettings) -> dict[str, Any]:
    return {
        "dtype": settings.dtype,
        "max_length": settings.max_length,
        "settings": settings.engine_settings,
        "served": settings.served,
    }


def _load_transformers(settings: WorkerSettings) -> TransformersTeacher:
    """Loads transformers' engine, which is both a teacher and a generator."""
    from teacher_dump.teachers.transformers_teacher import TransformersTeacher

    is_reference = settings.backend == REFERENCE
    own = {name: value for name, value in settings.engine_settings.items() if name == "trust_remote_code"}
    return TransformersTeacher(
        settings.checkpoint,
        dtype=settings.dtype,
        image_token_id=settings.facts.image_token_id,
        settings=own if is_reference else settings.engine_settings,
        spreads=is_reference,
    )
