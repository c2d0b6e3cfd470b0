"""What a dump costs beside its teacher's bare prefill, and beside vLLM's prompt_logprobs: `python -m benchmarks.dump`.

The teacher is a LLaVA with SmolLM2-135M as its decoder (V = 49,153); the samples are illustrated questions about
Python's documentation, four to an image of 64 visual tokens, which a dump prefills once for the four. The dump is the
default one (response, visual, relation) through Ray, from the first part that is begun to the last commit. The roads
are taken in turn, three times, the floor before and after each dump; ratios are medians of the three, of a dump to the
mean of its two floors. A second teacher is so small that its prefill hardly counts, with rows as peaked as SmolLM2's;
of one whose rows are flat the steps of a dump are shown.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import dump_host, dump_roads, smol_llava
from benchmarks.aside import Aside
from benchmarks.dump_roads import Floor, PromptLogprobs, Road, dump_settings
from benchmarks.results import Results, table, wants_json
from student_train.models.huggingface import import_transformers
from teacher_dump.dump import run_dump
from teacher_dump.workers.log_file import quiet

RUN = Path("runs/bench_dump")
IMAGE_SIZE = 128  # 64 visual tokens; LLaVA-1.5 has 576


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    samples: int = 256
    samples_per_image: int = 4
    answer_tokens: int = 24
    repetitions: int = 3
    memory_samples: tuple[int, int] = (500, 5000)
    memory_answer_tokens: int = 8  # short ones, since memory is by parts and images, not by rows


def measure(sizes: Sizes, run: Path, results: Results) -> list[list[object]]:
    """Fills the metrics; returns the table of seconds."""
    smol, small, flat, data = run / "smol", run / "peaked", run / "flat", run / "data"
    with Aside(Path, run) as there:
        there.ask(_save_teachers)
    source = questions(smol, data, sizes.samples, sizes)
    lines = []
    for teacher in (smol, small):
        roads = compare(teacher, source, sizes)
        lines += _lines(teacher.name, roads)
        dumped, floors = [road.total for road in roads["dump"]], [road.total for road in roads["floor"]]
        theirs = [road.total for road in roads["prompt_logprobs"]]
        over_floor = [dump / statistics.mean(floors[at : at + 2]) for at, dump in enumerate(dumped)]
        speedup = [other / dump for other, dump in zip(theirs, dumped, strict=True)]
        if teacher == smol:
            results.metrics["time_over_floor"] = statistics.median(over_floor)
            results.metrics["speedup_over_prompt_logprobs"] = statistics.median(speedup)
            results.details["time_over_floor"] = over_floor
        else:
            results.metrics["speedup_over_prompt_logprobs_small_teacher"] = statistics.median(speedup)
        results.details[f"speedup_over_prompt_logprobs of {teacher.name}"] = speedup
    with Aside(Floor, flat, source) as there:
        lines += _lines(flat.name, {"steps of a dump": [there.ask(dump_roads.steps)]})
    with Aside(Path, run / "host") as there:
        wall, processor = there.ask(dump_host.rows_per_s)
    results.metrics["host_rows_per_s"] = statistics.median(wall)
    results.details["host_rows_per_s"] = {"wall": wall, "processor": processor}
    peaks = []
    for count in sizes.memory_samples:
        short = replace(sizes, answer_tokens=sizes.memory_answer_tokens)
        _, peak = dump(small, questions(smol, run / f"data-{count}", count, short))
        peaks.append(peak)
    results.metrics["memory_growth"] = peaks[1] / peaks[0]
    results.details["peak_memory_bytes"] = dict(zip(map(str, sizes.memory_samples), peaks, strict=True))
    return lines


def compare(teacher: Path, source: Path, sizes: Sizes) -> dict[str, list[Road]]:
    """The roads of one teacher, each taken several times, in turn, the floor once more; the steps of a dump once."""
    roads: dict[str, list[Road]] = {"floor": [], "dump": [], "prompt_logprobs": []}
    with Aside(Floor, teacher, source) as ours, Aside(PromptLogprobs, teacher, source) as theirs:
        roads["floor"].append(ours.ask(dump_roads.floor))
        for _ in range(sizes.repetitions):
            roads["dump"].append(dump(teacher, source)[0])
            roads["floor"].append(ours.ask(dump_roads.floor))
            roads["prompt_logprobs"].append(theirs.ask(dump_roads.prompt_logprobs))
        return {**roads, "steps of a dump": [ours.ask(dump_roads.steps)]}


def dump(teacher: Path, source: Path) -> tuple[Road, int]:
    """A whole dump through Ray, and the peak of its actor's memory in bytes."""
    cache = teacher.parent / f"cache-{teacher.name}"
    shutil.rmtree(cache, ignore_errors=True)
    settings = dump_settings(teacher, source, cache=cache, cpus=os.cpu_count() or 1)
    shutil.rmtree(settings.logs, ignore_errors=True)  # which name the actor
    with _Watch(settings.logs) as watch:
        result = run_dump(settings, progress=False)
    if result.summary is None or result.num_errors:
        raise RuntimeError(f"{cache}: {result.num_errors} samples failed; see {settings.logs}")
    return Road({"dump": result.summary.seconds}, result.summary.num_tokens, 0), watch.peak_bytes


class _Watch:
    """Reads the peak memory of a dump's actor, which its log file names, until the dump ends."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.2):
            for log in self._logs.glob("teacher-*.log"):
                self.peak_bytes = max(self.peak_bytes, _peak_bytes(int(log.stem.rpartition("-")[2])))


def _peak_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _save_teachers(run: Path) -> None:
    smol_llava.save_smol_llava(run / "smol", image_size=IMAGE_SIZE)
    smol_llava.save_small_llava(run / "peaked", logit_std=6.25, image_size=IMAGE_SIZE)
    smol_llava.save_small_llava(run / "flat", logit_std=0.16, image_size=IMAGE_SIZE)


def questions(teacher: Path, folder: Path, num_samples: int, sizes: Sizes) -> Path:
    """A file of questions, written anew."""
    shutil.rmtree(folder, ignore_errors=True)
    return smol_llava.write_questions(
        folder,
        num_samples=num_samples,
        num_images=-(-num_samples // sizes.samples_per_image),
        answer_tokens=sizes.answer_tokens,
        tokenizer=import_transformers().AutoTokenizer.from_pretrained(teacher),
        image_size=IMAGE_SIZE,
    )


def _lines(teacher: str, roads: dict[str, list[Road]]) -> list[list[object]]:
    lines: list[list[object]] = []
    for name, found in roads.items():
        totals = [road.total for road in found]
        lines.append([teacher, name, found[0].num_tokens, found[0].num_rows or "", *_spread(totals)])
        parts = found[0].seconds if len(found[0].seconds) > 1 else ()
        lines += [["", f"  {part}", "", "", *_spread([road.seconds[part] for road in found])] for part in parts]
    return lines


def _spread(seconds: list[float]) -> list[object]:
    return [f"{value:.2f}" for value in (statistics.median(seconds), min(seconds), max(seconds))]


def main() -> None:
    """Measure, print, and exit."""
    as_json = wants_json(__doc__ or "")
    results = Results("benchmarks.dump")
    log = RUN.with_name(f"{RUN.name}-engines.log")
    print(f"the engines' messages go to {log}", file=sys.stderr, flush=True)
    with quiet(log):  # their processes too: vLLM warns once a call
        lines = measure(Sizes(), RUN, results)
    results.details["seconds"] = lines
    print(table(["teacher", "road", "tokens", "rows", "median s", "least", "most"], lines))
    results.print(as_json=as_json)


if __name__ == "__main__":
    main()
