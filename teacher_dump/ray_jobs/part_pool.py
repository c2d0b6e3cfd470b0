"""Scores the parts of a plan with a Ray Data pool of actors, each with its own teacher.

A part is the only unit of work. Parts that Ray does not finish, for whatever reason, are retried unless a commit
exists; attempts share no other state.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import ray
import ray.data
import zstandard
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from storage.errors import StillhouseError
from storage.processes.waiting import Waiting
from teacher_dump.data.partition import Part
from teacher_dump.ray_jobs.cluster import (
    GPUS_OF_ACTORS,
    check_room,
    connect_to_ray,
    describe_lacking_room,
    get_last_line,
    warn_about_room,
)
from teacher_dump.ray_jobs.device_record import LOSSES_IN_A_ROW, DeviceRecord, get_device_name
from teacher_dump.ray_jobs.placement import Placement
from teacher_dump.ray_jobs.teacher_actor import ActorResult, log_to_file
from teacher_dump.teachers.device_failure import is_device_failure, is_out_of_memory
from teacher_dump.workers.allocator import share_one_arena
from teacher_dump.workers.worker import OpenEngine, PartOutcome, Worker, WorkerSettings

PARTS_AT_ONCE = 3  # in an actor: one is written, one is scored, one waits with its first samples prepared
_NUM_RETRIES = 3  # of a part whose worker died: accidents may repeat, but a part that kills workers must not loop
_IDLE_ROUNDS = 2  # over the missing parts, in which none was committed
_GRACE_S = 12.0  # for parts in flight when the dump is stopped: everything has to end within 20 s
_GRACE_UNOPENED_S = 2.0  # while no teacher has scored anything yet
_END_S = 60.0  # for Ray Data to end after a stop: usually a moment, longer on a busy machine
_POLL_S = 0.2
_LONG_PART_S = 300.0  # without any part: then a notice tells that the dump still runs
_EXIT_CODE = 75  # of a process that lost its device; EX_TEMPFAIL in sysexits.h

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartPool:
    """The number of actors that score parts, and the resources that each requests of Ray."""

    min_actors: int
    max_actors: int  # beyond min_actors as the cluster has room and parts wait
    num_cpus: float
    num_gpus: float | None  # None: one for each of the engine's ranks where Ray has GPUs
    address: str | None = None


def score_parts(
    parts: Sequence[Part],
    settings: WorkerSettings,
    *,
    pool: PartPool,
    committed: Callable[[], Collection[int]],
    stop: threading.Event,
    logs: Path,
    notify: Callable[[str], None],
    open_engine: OpenEngine | None = None,
) -> Generator[PartOutcome, None, None]:
    """Scores and commits parts; yields outcomes as they come.

    A part whose actor or node dies is retried, elsewhere or later; `committed` tells which parts have their commits.
    Once `stop` is set no part begins; parts in flight have some seconds to end, then the outcomes end, too. Calls
    `notify` if the cluster has no room yet, since an autoscaler may still add it. `open_engine`: see Worker.
    Raises StillhouseError for errors of a worker's teacher, for unexpected errors of a worker, and for parts that no
    worker survives.
    """
    most = min(pool.max_actors, len(parts))
    local_cpus = math.ceil(most * pool.num_cpus) + 1  # one for Ray Data itself
    with connect_to_ray(pool.address, local_cpus=local_cpus) as is_fixed:
        placement = Placement.from_settings(settings.engine_settings, num_cpus=pool.num_cpus, num_gpus=pool.num_gpus)
        if is_fixed:
            check_room(placement.resources, what="an actor", field=GPUS_OF_ACTORS)
        warn_about_room(min(pool.min_actors, most), placement.resources, notify)
        gate = _Gate.start()
        actor = {"settings": settings, "gate": gate, "logs": logs.resolve(), "open_engine": open_engine}
        missing, idle, at_once = list(parts), 0, PARTS_AT_ONCE
        try:
            while missing and not stop.is_set():
                strategy = ray.data.ActorPoolStrategy(
                    min_size=min(pool.min_actors, len(missing)),
                    max_size=min(pool.max_actors, len(missing)),
                    max_tasks_in_flight_per_actor=at_once,
                    max_concurrent_calls_per_actor=at_once,
                    enable_true_multi_threading=True,
                )
                with (
                    _RowReader(_stream_outcome_rows(missing, strategy, placement, actor)) as rows,
                    Waiting(_WaitSubject(placement, len(missing), logs), say=notify) as waiting,
                ):
                    for outcome in _iterate_outcomes(rows, gate, stop):
                        waiting.reset(first_s=_LONG_PART_S)
                        yield outcome
                        waiting.reset()
                placement.remove_groups()
                if stop.is_set():
                    return
                there = set(committed())
                before, missing = len(missing), [part for part in missing if part.number not in there]
                idle = idle + 1 if len(missing) == before else 0
                if missing and idle == _IDLE_ROUNDS:
                    raise StillhouseError(_explain_giving_up(missing, rows.failure, logs))
                if missing:
                    _log.warning("%d parts are left; they are begun again: %s", len(missing), rows.failure)
                at_once = 1  # so that a part that kills its worker does not end other parts
        finally:
            placement.remove_groups()
            ray.kill(gate)


def _stream_outcome_rows(
    parts: Sequence[Part],
    strategy: ray.data.ActorPoolStrategy,
    placement: Placement,
    actor: Mapping[str, Any],
) -> Iterator[Mapping[str, Any]]:
    """Yields Ray Data's rows, one per finished part. Parts are sent compressed, one per block."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a part that is given up does not end the others
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0  # more actors as soon as all are busy
    rows = [{"part": zstandard.compress(part.to_text().encode())} for part in parts]
    outcomes = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _PartActor,
        fn_constructor_kwargs=dict(actor),
        batch_size=1,
        batch_format="numpy",
        compute=strategy,
        ray_remote_args_fn=placement.group_options if placement.makes_groups else None,
        max_restarts=-1,
        max_task_retries=_NUM_RETRIES,
        **placement.actor_options(),
    )
    for table in outcomes.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from pa.table(table).to_pylist()


def _iterate_outcomes(rows: _RowReader, gate: Any, stop: threading.Event) -> Iterator[PartOutcome]:
    """Yields outcomes until there are no more, or until parts in flight have ended after a stop."""
    deadline, grace_s = math.inf, _GRACE_UNOPENED_S
    while not rows.ended and time.monotonic() < deadline:
        if stop.is_set() and deadline == math.inf:
            deadline = time.monotonic() + grace_s  # Ray Data skips the other parts, since the gate is closed
        if stop.is_set():
            _close_gate(gate)  # repeatedly, since a lost gate is restarted open
        row = rows.next(timeout_s=_POLL_S)
        if row is None:
            continue
        ActorResult(failure=row["failure"], is_config=row["is_config"]).raise_failure()
        grace_s = _GRACE_S
        if row["part"] >= 0:
            yield PartOutcome(**{name: row[name] for name in PartOutcome.__dataclass_fields__})


@dataclass
class _WaitSubject:
    """Describes what the driver waits for."""

    placement: Placement
    num_parts: int
    logs: Path

    def __call__(self) -> str:
        lacks = describe_lacking_room(self.placement.resources, over_nodes=self.placement.makes_groups)
        if lacks:
            return f"Ray to place a teacher, which asks for {lacks}; Ctrl-C ends the wait"
        return f"a teacher to load, or to finish one of {self.num_parts:,} parts; its log is in {self.logs}"


class _RowReader:
    """Reads rows in a thread, since waiting for Ray Data cannot be interrupted.

    Use as a context manager: at its end Ray Data has ended, too, and Ray can be shut down.
    """

    def __init__(self, rows: Iterator[Mapping[str, Any]]) -> None:
        self.failure = ""  # why the rows ended too early
        self.ended = False
        self._made: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, args=(rows,), name="ray-rows", daemon=True)

    def __enter__(self) -> Self:
        ray.data.DataContext.get_current().custom_execution_callback_classes = [_StartedExecutors]
        _StartedExecutors.begun.clear()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + _END_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            for executor in list(_StartedExecutors.begun):  # none yet, if it is still being created
                executor.shutdown(force=False)
            self._thread.join(timeout=_POLL_S)

    def next(self, *, timeout_s: float) -> Mapping[str, Any] | None:
        """Returns the next row; None after a timeout, and at the end."""
        try:
            row = self._made.get(timeout=timeout_s)
        except queue.Empty:
            return None
        self.ended = row is None
        return row

    def _read(self, rows: Iterator[Mapping[str, Any]]) -> None:
        try:
            for row in rows:
                self._made.put(row)
        except Exception as error:  # Ray raises many kinds; the reader checks the commits
            self.failure = f"{type(error).__name__}: {get_last_line(error)}"
            _log.warning("Ray gave up", exc_info=error)
        finally:
            self._made.put(None)


class _StartedExecutors(ExecutionCallback):
    """Collects the executors that Ray Data starts in this process, which it exposes only to callbacks."""

    begun: ClassVar[list[Any]] = []

    def before_execution_starts(self, executor: Any) -> None:
        self.begun.append(executor)


class _Gate:
    """Lets parts begin until it is closed. An actor on the driver's node; if it is lost, Ray restarts it open."""

    def __init__(self) -> None:
        self._open = True
        self._devices = DeviceRecord()

    @staticmethod
    def start() -> Any:
        here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        kind = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(_Gate)
        return kind.remote()

    def is_open(self, device: str) -> bool:
        if self._open:
            self._devices.begin(device)
        return self._open

    def note_part(self, device: str) -> None:
        self._devices.note_part(device)

    def note_loss(self, device: str, num_parts: int) -> bool:
        return self._devices.note_loss(device, num_parts=num_parts)

    def close(self) -> None:
        self._open = False


def _close_gate(gate: Any) -> None:
    try:
        ray.get(gate.close.remote(), timeout=5)
    except RayError as error:
        _log.warning("the gate cannot be closed", exc_info=error)


class _PartActor:
    """A Worker as Ray Data calls it, from several threads."""

    def __init__(self, *, settings: WorkerSettings, gate: Any, logs: Path, open_engine: OpenEngine | None) -> None:
        share_one_arena()
        self._log_path = log_to_file(logs)
        self._settings = settings
        self._gate = gate
        self._open_engine = open_engine
        self._device = get_device_name()
        self._worker: Worker | None = None
        self._making = threading.Lock()
        self._leaving = threading.Lock()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        part = Part.from_text(zstandard.decompress(bytes(batch["part"][0])).decode())
        result, outcome = ActorResult(), _NOTHING
        if ray.get(self._gate.is_open.remote(self._device)):
            try:
                with self._making:
                    self._worker = self._worker or Worker(self._settings, open_engine=self._open_engine)
                outcome = self._worker.run(part)
                self._gate.note_part.remote(self._device)
            except Exception as error:
                result = (
                    self._end_process(error)
                    if self._needs_new_process(error)
                    else ActorResult.from_error(error, self._log_path)
                )
        row = {"failure": result.failure, "is_config": result.is_config, **asdict(outcome)}
        return {name: np.array([value]) for name, value in row.items()}

    def _needs_new_process(self, error: Exception) -> bool:
        """Returns whether a new process may succeed. A teacher that was never loaded may be too large."""
        is_loaded = self._worker is not None and self._worker.is_open
        return is_device_failure(error) or (is_loaded and is_out_of_memory(error))

    def _end_process(self, error: Exception) -> ActorResult:
        """Ends this process, which Ray then restarts; returns a failure only if that has failed too often.

        Writes parts that are scored already first.
        """
        with self._leaving:  # so that other parts that fail at the same time count as the same loss
            _log.error("the teacher's device failed on %s", self._device, exc_info=error)
            num_parts = 0 if self._worker is None else self._worker.finish_writing(limit_s=_GRACE_S)
            try:
                is_hopeless = ray.get(self._gate.note_loss.remote(self._device, num_parts))
            except RayError:  # a lost gate is restarted, and counts from 0
                is_hopeless = False
            if not is_hopeless:
                _log.error("this process ends, and Ray starts another")
                logging.shutdown()
                os._exit(_EXIT_CODE)
        return ActorResult(
            failure=f"the teacher's device fails again and again ({LOSSES_IN_A_ROW} processes in a row on each device; "
            f"the last one on {self._device}): {error}; the traceback is in {self._log_path}. What is committed stays: "
            "repair or leave out the device, or reduce its memory use (dump.rows_per_chunk, teacher.settings)"
        )


_NOTHING = PartOutcome(-1, 0, 0, 0, 0, 0.0, 0.0, 0)


def _explain_giving_up(missing: Sequence[Part], failure: str, logs: Path) -> str:
    shown = ", ".join(str(part.number) for part in missing[:10]) + (", …" if len(missing) > 10 else "")
    first = missing[0].samples[0].id if missing[0].samples else "none"
    return (
        f"{len(missing)} parts could not be scored, their workers died every time: {shown} "
        f"(part {missing[0].number} begins with sample {first!r}); see {logs}{': ' if failure else ''}{failure}"
    )
