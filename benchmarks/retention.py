"""What distillation from a cache keeps of distillation with the teacher in memory: `python -m benchmarks.retention`.

Digits students, paired seeds: the same untrained student, samples, order, steps and losses, against labels alone (sft)
and against whole rows of the teacher (online; it is frozen, so what it says of a sample is computed once). Gains are
falls in held-out KL to the teacher, dense, and rises in exact match; a share retained is a ratio of means over seeds,
its 95 % interval by Student's t on the linearised ratio. `--short` is one seed and three arms, a minute; `--resume`
goes on with the results that an earlier call wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.digits_run import DEMO, SHORT_STEPS, digits_run
from benchmarks.results import Results, table
from benchmarks.student_runs import Found, HeldOut, Schedule, judge, train_student
from benchmarks.teacher_caches import Asked, TeacherStates, ask_teacher, bytes_per_row, write_cache
from storage.config import CacheSection, HiddenSection, SelectionSection
from storage.reader.cache import Cache
from student_train.losses.config import DistributionLossSection, LossesSection

FOLDER = Path("runs/bench_retention")
TEACHER_STEPS = 1000  # of the teacher, where there is no demo
SEEDS, FEWER_SEEDS = 5, 3  # FEWER: of arms that nothing is decided by
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t by degrees of freedom, two-sided

RESPONSE: dict[str, SelectionSection | HiddenSection] = {
    "threshold .01": SelectionSection(),  # the default
    "threshold .1": SelectionSection(tau=0.1),
    "top-1": SelectionSection(method="topk", k=1),
    "top-8": SelectionSection(method="topk", k=8),
    "sampled 12": SelectionSection(method="sampled", draws=12),
    "sampled 50": SelectionSection(method="sampled", draws=50),
    "hidden float16": HiddenSection(),
}
VISUAL = {
    "threshold .02": SelectionSection(tau=0.02),  # pipeline.yaml's
    "top-16": SelectionSection(method="topk", k=16),
}


@dataclass(frozen=True)
class Arm:
    """One way to train: on which family, from which cache, how its rows are read."""

    family: str  # response or visual; "" for labels alone
    selection: str = ""  # "" with a family: the live teacher
    treatment: str = "exact"
    seeds: int = SEEDS

    @property
    def name(self) -> str:
        if not self.family:
            return "sft"
        return f"{self.family}, " + (f"{self.selection}, {self.treatment}" if self.selection else "online")

    def losses(self) -> LossesSection:
        """Labels, and the family's loss, at weight 1 each."""
        if not self.family:
            return LossesSection()
        return LossesSection.model_validate({self.family: {"treatment": self.treatment} if self.selection else {}})


DEFAULT_TREATMENT = DistributionLossSection().resolve_treatment(SelectionSection().selection)
SFT, ONLINE, ONLINE_VISUAL = Arm(""), Arm("response"), Arm("visual")
OFFLINE = Arm("response", "threshold .01", DEFAULT_TREATMENT)


def arms() -> list[Arm]:
    """All of them, the ones that decide first."""
    few = FEWER_SEEDS
    return [
        SFT,
        ONLINE,
        *(Arm("response", "threshold .01", treatment) for treatment in ("unbiased", "bucket")),
        ONLINE_VISUAL,
        *(Arm("visual", "threshold .02", treatment) for treatment in ("unbiased", "bucket")),
        *(Arm("response", "threshold .1", treatment) for treatment in ("unbiased", "bucket")),
        *(Arm("response", "threshold .01", treatment, few) for treatment in ("profile", "truncate", "renormalise")),
        *(Arm("response", "top-1", each, few) for each in ("bucket", "profile", "truncate", "renormalise")),
        *(Arm("visual", "threshold .02", each, few) for each in ("profile", "renormalise")),
        *(Arm("response", f"sampled {draws}", "unbiased", few) for draws in (12, 50)),
        Arm("response", "threshold .1", "profile", few),
        Arm("response", "hidden float16", "exact", few),
        *(Arm("visual", "top-16", each, few) for each in ("bucket", "renormalise")),
        *(Arm("response", "top-8", each, few) for each in ("bucket", "renormalise")),
    ]


def short_arms() -> list[Arm]:
    """One seed of the ones that the limits are about."""
    chosen = [SFT, ONLINE, Arm("response", "threshold .01", DEFAULT_TREATMENT)]
    return [Arm(each.family, each.selection, each.treatment, 1) for each in chosen]


@dataclass(frozen=True, eq=False)
class _Bench:
    """What a worker keeps open."""

    run: Path
    asked: Asked
    train: TeacherStates
    held_out: HeldOut
    caches: dict[tuple[str, str], Cache]
    schedule: Schedule


_bench: _Bench | None = None  # of a worker


def _open(run: Path, folders: dict[tuple[str, str], Path], schedule: Schedule) -> None:
    global _bench
    torch.set_num_threads(1)
    asked = Asked.open(run / "cache", run / "models/teacher")
    train, test = (ask_teacher(asked, split) for split in ("train", "test"))
    held_out = HeldOut.of(asked, test)
    caches = {name: Cache.open(folder, max_bytes=1 << 30) for name, folder in folders.items()}
    _bench = _Bench(run, asked, train, held_out, caches, schedule)


def _train(arm: Arm, seed: int) -> Found:
    assert _bench is not None
    cache = _bench.caches[arm.family, arm.selection] if arm.selection else None
    online = _bench.train if arm.family and not arm.selection else None
    init = _bench.run / f"models/student_init_{seed}"
    student, seconds = train_student(init, _bench.asked, arm.losses(), cache, seed, _bench.schedule, online=online)
    return judge(student, _bench.held_out, seconds)


def write_caches(
    run: Path, folder: Path, wanted: Sequence[Arm]
) -> tuple[dict[tuple[str, str], Path], dict[str, float]]:
    """The caches that some arms read, and bytes a row of each."""
    asked = Asked.open(run / "cache", run / "models/teacher")
    states = ask_teacher(asked, "train")
    places, sizes = {}, {}
    for family, name in dict.fromkeys((arm.family, arm.selection) for arm in wanted if arm.selection):
        section = (RESPONSE if family == "response" else VISUAL)[name]
        place = folder / f"{family}-{name.replace(' ', '-')}"
        stored = "hidden" if isinstance(section, HiddenSection) else family
        chosen = CacheSection.model_validate({"families": [stored], stored: section})
        cache = write_cache(place, asked, states, chosen)
        places[family, name] = place
        sizes[f"{family}, {name}"] = next(iter(bytes_per_row(cache).values()))
    return places, sizes


def results_of(
    run: Path, wanted: Sequence[Arm], schedule: Schedule, *, resume: bool, scratch: Path
) -> tuple[dict[Arm, dict[int, Found]], dict[str, float]]:
    """What each arm found, seed by seed; every result is on disk as soon as it is there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "results.jsonl"
    key = {"schedule": asdict(schedule), "teacher": _sha256(run / "models/teacher/model.safetensors")}
    known = dict(_read(path, key)) if resume and path.exists() else {}
    if not resume:
        path.unlink(missing_ok=True)
    found: dict[Arm, dict[int, Found]] = {arm: {} for arm in wanted}
    for arm in wanted:
        found[arm] |= {seed: known[arm.name, seed] for seed in range(arm.seeds) if (arm.name, seed) in known}
    jobs = [(arm, seed) for arm in wanted for seed in range(arm.seeds) if seed not in found[arm]]
    places, sizes = write_caches(run, scratch, wanted)
    os.environ["OMP_NUM_THREADS"] = "1"
    workers, context = os.cpu_count() or 1, multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_open, initargs=(run, places, schedule)) as pool:
        running = {pool.submit(_train, arm, seed): (arm, seed) for arm, seed in jobs}
        for number, done in enumerate(as_completed(running), start=1):
            arm, seed = running[done]
            found[arm][seed] = done.result()
            with path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({**key, "arm": arm.name, "seed": seed, "found": asdict(done.result())}) + "\n")
            print(f"{number}/{len(jobs)} {arm.name}, seed {seed}: {found[arm][seed]}", flush=True)
    return found, sizes


def _read(path: Path, key: dict[str, Any]) -> Iterator[tuple[tuple[str, int], Found]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if {name: row[name] for name in key} == key:
            yield (row["arm"], row["seed"]), Found(**row["found"])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Share:
    """A ratio of means over paired seeds, with its 95 % interval; without one where there is one seed."""

    value: float
    low: float
    high: float


def share(gains: Sequence[float], whole: Sequence[float]) -> Share:
    """mean(gains) / mean(whole). The interval is of the residuals gains - ratio * whole."""
    ratio = statistics.mean(gains) / statistics.mean(whole)
    if len(gains) == 1:
        return Share(ratio, math.nan, math.nan)
    residuals = [a - ratio * b for a, b in zip(gains, whole, strict=True)]
    error = statistics.stdev(residuals) / math.sqrt(len(gains)) / abs(statistics.mean(whole))
    half = T_95[len(gains) - 1] * error
    return Share(ratio, ratio - half, ratio + half)


def retained(found: dict[Arm, dict[int, Found]], arm: Arm, online: Arm, measure: str, sign: int) -> Share:
    """What an arm keeps of the change from labels alone to the live teacher, over the seeds that all three have."""
    sft, best, ours = _of(found, SFT), _of(found, online), _of(found, arm)
    seeds = sorted(set(sft) & set(best) & set(ours))

    def gains(runs: dict[int, Found]) -> list[float]:
        return [sign * (getattr(runs[seed], measure) - getattr(sft[seed], measure)) for seed in seeds]

    return share(gains(ours), gains(best))


def _of(found: dict[Arm, dict[int, Found]], arm: Arm) -> dict[int, Found]:
    return next(runs for each, runs in found.items() if each.name == arm.name)


def print_table(found: dict[Arm, dict[int, Found]], sizes: dict[str, float]) -> None:
    """Every arm: bytes a row, means and spreads over its seeds, shares retained."""
    for family in ("response", "visual"):
        measure = {"response": "kl", "visual": "visual_kl"}[family]
        online = Arm(family)
        if not any(arm.name == online.name for arm in found):
            continue
        lines = []
        for arm, runs in found.items():
            if arm.family not in ("", family) or not runs:
                continue
            columns = [
                _mean_sd(runs, "accuracy", 100), _mean_sd(runs, measure, 1), _mean_sd(runs, "calibration_error", 100)
            ]  # fmt: skip
            size = f"{sizes[f'{family}, {arm.selection}']:.1f}" if arm.selection else ""
            kept = _spelt(retained(found, arm, online, measure, -1)) if arm.selection else ""
            place = arm.selection or arm.name, arm.treatment if arm.selection else "", size
            lines.append([*place, *columns, kept, len(runs)])
        measures = "exact match %", "KL, nats", "calibration error %", "KL gain retained"
        print("\n" + table((f"{family} rows", "treatment", "bytes a row", *measures, "seeds"), lines))


def _mean_sd(runs: dict[int, Found], name: str, factor: float) -> str:
    values = [factor * getattr(each, name) for each in runs.values()]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    digits = 1 if factor == 100 else 4
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def _spelt(found: Share) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def main() -> None:
    """Train, judge, print, and exit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--short", action="store_true", help="one seed, few arms, fewer steps")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier call has found")
    options = parser.parse_args()
    wanted, schedule = (short_arms(), Schedule(steps=100)) if options.short else (arms(), Schedule())
    run = digits_run(DEMO, teacher_steps=SHORT_STEPS if options.short else TEACHER_STEPS, report=print)
    with tempfile.TemporaryDirectory() as scratch:
        found, sizes = results_of(run, wanted, schedule, resume=options.resume, scratch=Path(scratch))
    print_table(found, sizes)
    results = Results("retention")
    for name, measure, sign in (("kl_gain_retained", "kl", -1), ("accuracy_gain_retained", "accuracy", 1)):
        kept = retained(found, OFFLINE, ONLINE, measure, sign)
        results.metrics[name] = kept.value
        if not math.isnan(kept.low):
            results.metrics |= {f"{name}_low": kept.low, f"{name}_high": kept.high}
    results.details = {
        "run": str(run), "schedule": asdict(schedule), "default_treatment": DEFAULT_TREATMENT, "bytes_per_row": sizes,
        "arms": {arm.name: {seed: asdict(each) for seed, each in runs.items()} for arm, runs in found.items()},
    }  # fmt: skip
    results.print(as_json=options.json)


if __name__ == "__main__":
    main()
