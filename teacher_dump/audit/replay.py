"""Replay: scores random samples of a cache again with its teacher, and measures how much the cache differs.

Each sample is scored twice, in different batches: their difference is the teacher's own noise. The cache may differ
from the first scoring by its encoding error and by NOISE_FACTOR times that noise; more is drift. In the mean of all
rows it may differ by check.max_engine_kl, whatever the noise; where another engine made the cache, as when transformers
replays what vLLM wrote, this limit alone counts, since two engines differ by more than either differs from itself.
It finds rows of another sample, shifted rows, rows of another teacher, and rows computed with a stale prefix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from storage.errors import CacheError, IdentityError, StillhouseError
from storage.identity import TEACHER_FIELDS, Identity, describe_differences
from storage.reader.cache import Cache
from storage.records.records import SampleError
from teacher_dump.audit.comparison import KL, Comparison, Measurement
from teacher_dump.execution.worker_setup import call_with_teacher, make_worker_settings
from teacher_dump.planning.dump_plan import DumpPlan, plan_dump
from teacher_dump.settings import DumpSettings
from teacher_dump.signals.scoring import PartScorer

# As in the vision check: the maxima of two sets of a few hundred such numbers rarely differ by more. With a factor of
# 1 every second good cache would be refused, since either of two equal sets may have the larger maximum.
NOISE_FACTOR = 4.0
FROM_THE_TEACHER = ("response", "visual", "relation", "sequence", "hidden")
_WITH_KL = ("response", "visual", "hidden")
_SAMPLES_AT_ONCE = 32  # whose hidden states are in memory together
_SECOND_BATCH = 5  # samples in a batch of the second scoring


@dataclass(frozen=True)
class Spread:
    """Mean, 99th percentile and maximum of numbers that are not negative."""

    mean: float
    p99: float
    max: float

    @staticmethod
    def from_values(values: NDArray[np.float64]) -> Spread:
        """Computes the statistics; zeros if there are no numbers."""
        if not len(values):
            return Spread(0.0, 0.0, 0.0)
        p99 = np.quantile(values, 0.99, method="higher")
        return Spread(float(values.mean()), float(p99), float(values.max()))


@dataclass(frozen=True)
class Drift:
    """The drift of one measure of one family over all replayed samples."""

    family: str
    measure: str
    count: int  # rows, matrices or samples
    noise: Spread  # between two scorings of the same samples in different batches
    drift: Spread  # between the cache and the first scoring
    excess: Spread  # of the drift beyond the possible error of the cache's encoding
    samples: tuple[str, ...]  # ids of those that drifted
    limit: float | None = None  # of the mean excess, in nats; None: the noise is the limit

    @property
    def is_drift(self) -> bool:
        return bool(self.samples)


@dataclass(frozen=True)
class Replay:
    """The result of a replay. The cache matches its teacher if `ok`."""

    seed: int
    num_samples: int
    engine: tuple[str, str]  # the cache's and the present one
    drifts: tuple[Drift, ...]
    refused: tuple[SampleError, ...]  # samples that could not be scored again

    @property
    def ok(self) -> bool:
        return not self.refused and not any(drift.is_drift for drift in self.drifts)


@dataclass(frozen=True)
class ReplayTask:
    """The cache and the sample indices that an actor replays."""

    cache: str
    indices: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ReplayMeasurements:
    """The measurements of all replayed samples, and samples that could not be scored."""

    measured: tuple[Measurement, ...]
    refused: tuple[SampleError, ...]


def replay(settings: DumpSettings, path: str, *, num_samples: int, seed: int) -> Replay:
    """Scores `num_samples` random samples of the cache at `path` again with the teacher of `settings`.

    Reads images from the cache's image root, or from that of `settings` if that folder is gone. The vLLM backend
    runs in an actor of Ray, transformers in this process. Raises IdentityError naming each field in which the
    teacher differs from the cache's; CacheError for a cache without a teacher's signals or samples.
    """
    cache = Cache.open(path)
    held = tuple(family for family in FROM_THE_TEACHER if family in cache.families)
    if not held or not cache.num_samples:
        raise CacheError(f"{path}: holds {', '.join(cache.families)} of {cache.num_samples} samples: nothing to replay")
    own = settings.cache.model_copy(update={"path": path, "families": held})
    settings = replace(settings, cache=own)
    planned = plan_dump(settings)
    check_same_teacher(cache.identity, planned.identity, path)
    if (root := cache.image_root).is_dir():
        there = planned.identity.model_copy(update={"image_root": str(root)})
        planned = replace(planned, identity=there)
    is_same_engine = cache.identity.engine.split()[:1] == planned.identity.engine.split()[:1]
    if not is_same_engine and not set(held) & set(_WITH_KL):
        raise CacheError(
            f"{path}: was made by {cache.identity.engine}, and holds none of {', '.join(_WITH_KL)}, by which another "
            f"engine is compared; replay it with teacher.backend: {cache.identity.engine.split()[0]}"
        )
    chosen = np.random.default_rng(seed).permutation(cache.num_samples)[:num_samples]
    task = ReplayTask(path, tuple(sorted(int(index) for index in chosen)))
    found = _measure_with_teacher(planned, settings, task)
    return Replay(
        seed=seed,
        num_samples=len(task.indices),
        engine=(cache.identity.engine, planned.identity.engine),
        drifts=tuple(
            summarize_drifts(found.measured, max_kl=settings.check.max_engine_kl, is_same_engine=is_same_engine)
        ),
        refused=found.refused,
    )


def check_same_teacher(cache: Identity, run: Identity, path: str) -> None:
    """Raises IdentityError, with a line for each differing field, if the present teacher is not the cache's.

    The engine may be another one: replay measures what that changes.
    """
    same = {name: getattr(cache, name) for name in Identity.model_fields if name not in TEACHER_FIELDS}
    lines = describe_differences(cache, run.model_copy(update=same))
    if lines:
        raise IdentityError(
            f"{path}: was made by another teacher, {cache.teacher}; give the configuration that made it:"
            + "".join(f"\n  {line}" for line in lines)
        )


def _measure_with_teacher(planned: DumpPlan, settings: DumpSettings, task: ReplayTask) -> ReplayMeasurements:
    if settings.teacher.backend != "transformers":
        return call_with_teacher(planned, settings, measure, task)
    from teacher_dump.workers.worker import open_scorer

    return measure(open_scorer(make_worker_settings(planned, settings)), task)


def measure(scorer: PartScorer, task: ReplayTask) -> ReplayMeasurements:
    """Measures each replayed sample with a loaded teacher."""
    cache = Cache.open(task.cache)
    bounds = {family: errors["max"] for family, errors in cache.statistics()["errors_by_family"].items()}
    assert scorer.teacher is not None
    head = scorer.teacher.head
    measured: list[Measurement] = []
    refused: list[SampleError] = []
    for start in range(0, len(task.indices), _SAMPLES_AT_ONCE):
        chunk = [cache.read(index) for index in task.indices[start : start + _SAMPLES_AT_ONCE]]
        restored = scorer.restore([record.tokens for record in chunk])
        scored = scorer.hidden_states(restored.ready)
        refused += (*restored.errors, *scored.errors)
        others = restored.ready[::-1]
        batches = [others[at : at + _SECOND_BATCH] for at in range(0, len(others), _SECOND_BATCH)]
        again = [pair for batch in batches for pair in scorer.hidden_states(batch).accepted]
        second = {sample.record.sample_id: states.float() for sample, states in again}
        records = {record.tokens.sample_id: record for record in chunk}
        for sample, first in scored.accepted:
            name = sample.record.sample_id
            if name in second:
                comparison = Comparison(cache.identity, head, sample, records[name], bounds)
                measured += comparison.measure(first.float(), second[name])
    return ReplayMeasurements(tuple(measured), tuple(refused))


def summarize_drifts(
    measured: Sequence[Measurement], *, max_kl: float = math.inf, is_same_engine: bool = True
) -> Iterator[Drift]:
    """Yields the drift of each family and measure, with the samples that drifted.

    `max_kl`: nats a row that the cache may differ by in the mean. With another engine than the cache's it is the only
    limit, and measures other than KL are shown without one.
    """
    for family, name in dict.fromkeys((one.family, one.measure) for one in measured):
        some = [one for one in measured if (one.family, one.measure) == (family, name)]
        noise = Spread.from_values(np.concatenate([one.noise for one in some]))
        drift = np.concatenate([one.drift for one in some])
        beyond = {id(one): np.maximum(0, one.drift - one.allowed) for one in some}
        excess = Spread.from_values(np.concatenate(list(beyond.values())))
        if name == KL:
            is_beyond = excess.mean > max_kl
            drifted = [
                one.sample_id for one in some if is_beyond and len(one.drift) and beyond[id(one)].mean() > max_kl
            ]
        else:
            drifted = [
                one.sample_id
                for one in some
                if is_same_engine
                and len(one.drift)
                and (
                    beyond[id(one)].max() > NOISE_FACTOR * noise.max
                    or (excess.mean > NOISE_FACTOR * noise.mean and beyond[id(one)].mean() >= excess.mean)
                )
            ]
        limit = max_kl if name == KL else None
        yield Drift(
            family, name, len(drift), noise, Spread.from_values(drift), excess, tuple(dict.fromkeys(drifted)), limit
        )


def format_replay(found: Replay) -> str:
    """Formats the findings for a terminal, one line per measure."""
    head = ("family", "measure", "rows", "noise mean", "p99", "max", "drift mean", "p99", "max", "drifted")
    lines: list[tuple[str, ...]] = [head]
    for one in found.drifts:
        numbers = [
            f"{value:.2e}" for spread in (one.noise, one.drift) for value in (spread.mean, spread.p99, spread.max)
        ]
        lines.append((one.family, one.measure, f"{one.count:,}", *numbers, f"{len(one.samples)} samples"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if found.engine[0] != found.engine[1]:
        text.append(f"the cache was made by {found.engine[0]}, this is {found.engine[1]}")
    if found.engine[0].split()[:1] != found.engine[1].split()[:1]:
        text.append("of another engine the mean KL alone is limited, by check.max_engine_kl")
    return "\n".join(text)


def check_drift(found: Replay, path: str) -> None:
    """Raises StillhouseError naming the samples that drifted, or could not be scored again."""
    if found.ok:
        return
    lines = [f"  {error.sample_id}: cannot be scored again: {error.reason}" for error in found.refused]
    for one in found.drifts:
        if one.is_drift:
            shown = ", ".join(one.samples[:10]) + (", …" if len(one.samples) > 10 else "")
            if one.limit is not None:
                lines.append(
                    f"  {one.family} {one.measure}: {one.excess.mean:.3g} nats a row from the teacher in the mean, "
                    f"besides what encoding cost; check.max_engine_kl allows {one.limit:g}; samples {shown}"
                )
                continue
            lines.append(
                f"  {one.family} {one.measure}: up to {one.drift.max:.3g} from the teacher, {one.excess.max:.3g} more "
                f"than encoding cost; allowed are {NOISE_FACTOR:g} times its own noise, {one.noise.max:.3g} at most; "
                f"samples {shown}"
            )
    raise StillhouseError(
        f"{path}: of {found.num_samples} samples some are not what the teacher says (seed {found.seed}); "
        "dump the cache again, or find out what changed:\n" + "\n".join(lines)
    )
