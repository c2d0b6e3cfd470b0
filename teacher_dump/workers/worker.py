"""A worker: one process's teacher, which scores parts and commits them to the cache.

Parts may be given by several threads at once, and then overlap: while one part has the teacher, another is being
encoded, compressed and written, and the first samples of a third are decoded. Each of the three has one thread's time.
"""

from __future__ import annotations

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
from teacher_dump.signals.loaded_teacher import OpenTeacher
from teacher_dump.signals.pixel_check import check_pixel_values
from teacher_dump.signals.scoring import Chunk, PartScorer, Scored
from teacher_dump.signals.spec import SignalRequest
from teacher_dump.signals.vision_check import check_sight
from teacher_dump.teachers.fingerprint import ProcessorFacts
from teacher_dump.teachers.teacher import Generator, Teacher

if TYPE_CHECKING:
    from teacher_dump.teachers.transformers_teacher import TransformersTeacher

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerSettings:
    """Everything that a worker needs to know, in plain values that travel between processes."""

    checkpoint: Path
    backend: str  # vllm or transformers
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
    check_samples: tuple[Sample, ...]  # for the blind check; none: no check
    too_long: TooLong = "refuse"
    template_arguments: dict[str, Any] = field(default_factory=dict)  # of the chat template


OpenEngine = Callable[[WorkerSettings], Teacher]


@dataclass(frozen=True)
class PartOutcome:
    """What became of one part."""

    part: int
    num_samples: int  # with a record
    num_errors: int
    num_tokens: int  # positions that the teacher was asked about; 0 if the part was there already
    num_bytes: int  # of the part's files
    started: float  # seconds since the epoch: scoring began
    finished: float  # the part was committed
    peak_memory_bytes: int  # of the worker's process so far
    num_cut: int = 0  # samples with a record that were too long to keep whole


class Worker:
    """Scores and commits parts. Its teacher is loaded, and seen to see, on the first one.

    Invariant: the teacher is used in one thread only, prompts and images are made in one, and one part is written
    at a time. So no more is in memory than a part that is written, one that is scored, and two chunks of samples.
    """

    def __init__(self, settings: WorkerSettings, *, open_engine: OpenEngine | None = None) -> None:
        """`open_engine` loads the teacher's engine; by default the one that the settings name."""
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
        self._opening = threading.Lock()
        self._teaching = ThreadPoolExecutor(1, "teacher")
        self._preparing = ThreadPoolExecutor(1, "samples")
        self._writing = threading.Lock()
        self._changed = threading.Condition()
        self._num_unwritten = 0  # parts that are scored and not yet committed
        self._num_written = 0

    def run(self, part: Part) -> PartOutcome:
        """Score a part and commit it; one that is committed already is left alone.

        Errors: StillhouseError: the teacher cannot be used, or the cache not written to.
        """
        started = time.time()
        commit = self._writer.commit_of(part.number)
        if commit is not None:
            return _outcome(part, commit, None, started)
        with self._opening:
            if self._scorer is None:
                self._scorer = self._teaching.submit(self._open_scorer).result()
        started = time.time()
        chunks = ahead(self._scorer.chunks(part), self._preparing)
        scored = self._teaching.submit(self._score, part, chunks).result()
        try:
            with self._writing:
                commit = self._writer.write_part(part.number, scored.records)
                self._num_written += 1
        finally:
            with self._changed:
                self._num_unwritten -= 1
                self._changed.notify_all()
        return _outcome(part, commit, scored, started)

    def finish_writing(self, *, limit_s: float) -> int:
        """Wait until the parts that are scored by now are committed, or cannot be; how many this worker has committed.

        For a process that is about to end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._num_unwritten == 0, timeout=limit_s)
            return self._num_written

    def _score(self, part: Part, chunks: Iterator[Chunk]) -> Scored:
        assert self._scorer is not None
        scored = self._scorer.score(part, chunks)
        with self._changed:  # in the teacher's thread, so that it is counted before a later part can fail
            self._num_unwritten += 1
        return scored

    @property
    def is_open(self) -> bool:
        """Whether its teacher is loaded."""
        return self._scorer is not None

    def _open_scorer(self) -> PartScorer:
        with Waiting("the teacher to load"):
            scorer = open_scorer(self._settings, self._open_engine)
        if scorer.teacher is not None and self._settings.request.hidden_limit is not None:
            self._writer.put_head(scorer.teacher.head.stored())
        return scorer


def _outcome(part: Part, commit: Commit, scored: Scored | None, started: float) -> PartOutcome:
    """Of a part that was scored; None: somebody has done it before."""
    return PartOutcome(
        part=part.number,
        num_samples=commit.num_samples,
        num_errors=len(commit.errors if scored is None else scored.records.errors),
        num_tokens=0 if scored is None else scored.num_tokens,
        num_bytes=sum(entry.file_bytes for entry in commit.families.values()),
        started=started,
        finished=time.time(),
        peak_memory_bytes=peak_memory_bytes(),
        num_cut=0 if scored is None else scored.num_cut,
    )


def ahead(items: Iterator[T], executor: Executor) -> Iterator[T]:
    """The same items, of which the executor always makes the next one, the first from this call on."""
    made = executor.submit(next, items, None)

    def following() -> Iterator[T]:
        future = made
        while (item := future.result()) is not None:
            future = executor.submit(next, items, None)
            yield item

    return following()


def peak_memory_bytes() -> int:
    """The most that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts kibibytes


def open_preparer(settings: WorkerSettings) -> Preparer:
    """Load the teacher's processor; no weights. ConfigError: relation matrices of a grid that cannot be pooled."""
    facts = settings.facts
    trust = bool(settings.engine_settings.get("trust_remote_code", False))
    processor = load_processor(settings.checkpoint, trust_remote_code=trust)
    grid = VisualGrid(processor, facts.image_token_id)
    if settings.request.relation_pool is not None and facts.image_token_id >= 0 and not grid.is_fixed:
        raise ConfigError(
            "cache.relation.pool: averages over blocks of a square grid, but this teacher lays out visual tokens by an "
            "image's size; leave it out"
        )
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
    """A scorer with its teacher loaded, and seen to see. StillhouseError: the teacher cannot be used."""
    preparer = open_preparer(settings)
    teacher = open_teacher(settings, open_engine) if settings.request.needs_teacher else None
    scorer = PartScorer(preparer, settings.request, teacher)
    if teacher is not None and settings.check_samples:
        check_sight(scorer, teacher.head, settings.check_samples, pixels=settings.facts.pixels)
        _check_pixel_values(settings, scorer, teacher)
    return scorer


def _check_pixel_values(settings: WorkerSettings, scorer: PartScorer, teacher: OpenTeacher) -> None:
    trust = bool(settings.engine_settings.get("trust_remote_code", False))
    check_pixel_values(
        teacher.engine,
        load_processor(settings.checkpoint, trust_remote_code=trust),
        scorer.prepare(settings.check_samples, []),
        image_token_id=settings.facts.image_token_id,
    )


def open_teacher(settings: WorkerSettings, open_engine: OpenEngine | None = None) -> OpenTeacher:
    """Load the engine and the output head, the head on the GPU where there is one."""
    import torch

    from teacher_dump.signals.lm_head import read_head

    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = read_head(settings.checkpoint, vocab_size=settings.facts.vocab_size, device=device)
    return OpenTeacher((open_engine or _open_engine)(settings), head)


def open_generator(settings: WorkerSettings) -> Generator:
    """Load the engine to write answers with."""
    if settings.backend != "vllm":
        return _open_transformers(settings)
    from teacher_dump.teachers.vllm_teacher import VllmGenerator

    return VllmGenerator(settings.checkpoint, **_vllm_options(settings))


def _open_engine(settings: WorkerSettings) -> Teacher:
    if settings.backend != "vllm":
        return _open_transformers(settings)
    from teacher_dump.teachers.vllm_teacher import VllmTeacher

    return VllmTeacher(settings.checkpoint, **_vllm_options(settings))


def _vllm_options(settings: WorkerSettings) -> dict[str, Any]:
    return {
        "dtype": settings.dtype,
        "max_length": settings.max_length,
        "settings": settings.engine_settings,
        "served": settings.served,
    }


def _open_transformers(settings: WorkerSettings) -> TransformersTeacher:
    """Both a teacher and a generator."""
    from teacher_dump.teachers.transformers_teacher import TransformersTeacher

    return TransformersTeacher(
        settings.checkpoint,
        dtype=settings.dtype,
        image_token_id=settings.facts.image_token_id,
        settings=settings.engine_settings,
    )
