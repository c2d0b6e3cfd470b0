"""What a dump costs beside its teacher's bare prefill, and beside vLLM's prompt_logprobs: `python -m benchmarks.dump`.

The teacher is a LLaVA with SmolLM2-135M as its decoder (V = 49,153); the samples are illustrated questions about
Python's documentation. The dump is the default one (response, visual, relation) through Ray, from its first part to
its last commit. A second teacher is so small that its prefill hardly counts. Medians of three.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from benchmarks import dump_host, dump_roads, smol_llava
from benchmarks.dump_roads import REPETITIONS, Road
from benchmarks.results import Results, table, wants_json
from student_train.huggingface import transformers_module

NUM_SAMPLES = 256
NUM_IMAGES = 64
ANSWER_TOKENS = 24
RUN = Path("runs/bench_dump")

P = ParamSpec("P")
T = TypeVar("T")


def main() -> None:
    """Run all and print."""
    as_json = wants_json(__doc__ or "")
    results = Results("benchmarks.dump")
    cpus = os.cpu_count() or 1
    source = apart(_prepare, RUN)
    rows = []
    for name in ("smol", "small"):
        teacher = RUN / name
        seconds = _dump(teacher, source, cpus)
        roads: dict[str, Road] = {"prompt_logprobs": apart(dump_roads.prompt_logprobs, teacher, source)}
        if name == "smol":
            roads["floor"] = apart(dump_roads.floor, teacher, source)
        dumped = statistics.median(seconds)
        for road, found in roads.items():
            rows.append([name, road, found.num_tokens, found.num_rows, *_spread(found.seconds)])
            rows += [["", f"  {part}", "", "", *_spread(each)] for part, each in found.parts.items()]
        rows.append([name, "dump", "", "", *_spread(seconds)])
        ratio = statistics.median(roads["prompt_logprobs"].seconds) / dumped
        if name == "smol":
            results.metrics["time_over_floor"] = dumped / statistics.median(roads["floor"].seconds)
            results.metrics["speedup_over_prompt_logprobs"] = ratio
        else:
            results.metrics["speedup_over_prompt_logprobs_small_teacher"] = ratio
    host = apart(dump_host.rows_per_s, RUN / "host")
    results.metrics["host_rows_per_s"] = statistics.median(host)
    results.details["host_rows_per_s"] = host
    print(table(["teacher", "road", "tokens", "rows", "median s", "least", "most"], rows))
    results.details["roads"] = rows
    results.print(as_json=as_json)


def apart(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """A function's result, computed in a fresh process with all cores."""
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments, named)


def _prepare(run: Path) -> Path:
    smol_llava.save_smol_llava(run / "smol")
    smol_llava.save_small_llava(run / "small")
    return smol_llava.write_questions(
        run / "data", num_samples=NUM_SAMPLES, num_images=NUM_IMAGES, answer_tokens=ANSWER_TOKENS,
        tokenizer=transformers_module().AutoTokenizer.from_pretrained(run / "smol"),
    )  # fmt: skip


def _dump(teacher: Path, source: Path, cpus: int) -> list[float]:
    from teacher_dump.dump import run_dump

    seconds = []
    for repetition in range(REPETITIONS):
        cache = teacher.parent / f"cache-{repetition}"
        shutil.rmtree(cache, ignore_errors=True)
        result = run_dump(dump_roads.dump_settings(teacher, source, cache=cache, cpus=cpus), progress=False)
        assert result.summary is not None
        assert result.num_errors == 0
        seconds.append(result.summary.seconds)
    return seconds


def _spread(seconds: list[float]) -> list[str]:
    return [f"{value:.2f}" for value in (statistics.median(seconds), min(seconds), max(seconds))]


if __name__ == "__main__":
    main()
