"""What a training step costs from a cache, from labels alone, with the teacher in memory: `python -m benchmarks.step`.

A step is all of it: the rows read from the cache and collated, forward, backward, clipping, AdamW; float32 on a CPU,
features of the frozen tower known. Ways take turns on the same samples; a ratio is the median over rounds of the two
steps' ratio. Three students: the digits' own; a LLaVA whose decoder is SmolLM2-135M; and `small`, SmolLM2's vocabulary
behind a random decoder so small that a teacher of thirty times its size fits beside it. Teachers are random decoders of
2, 8 and 30 times the student's parameters: what they say costs the same. Memory is the peak of a process of its own,
beyond what it held before there was a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import smol_llava
from benchmarks.aside import Aside
from benchmarks.digits_run import DEMO, SHORT_STEPS, digits_run
from benchmarks.results import Results, table, wants_json
from benchmarks.step_ways import LOSSES, SCALES, Subject, Ways, peak_bytes, take_turns
from benchmarks.teacher_caches import Asked, ask_teacher, write_cache
from storage.config import CacheSection, SelectionSection
from student_train.models.huggingface import load_tokenizer
from teacher_dump.config import DataSection, DumpSection, SourceSection, TeacherSection
from teacher_dump.dump import run_dump
from teacher_dump.settings import DumpSettings

RUN = Path("runs/bench_step")
SPLIT = "train"
ANSWER_TOKENS, NUM_SAMPLES, NUM_IMAGES = 64, 32, 16
CACHE = CacheSection(visual=SelectionSection(tau=0.02))  # as pipeline.yaml has it: response, visual, relation
BESIDE = tuple(LOSSES)[2:]  # ways with more rows than SFT has
IN_MEMORY = tuple(f"online {scale}x" for scale in SCALES)


def main() -> None:
    """Measure, print, and exit."""
    as_json = wants_json(__doc__ or "")
    results = Results("step")
    run = digits_run(DEMO, teacher_steps=SHORT_STEPS, report=print)
    with Aside(Path, RUN) as there:  # models and caches are made in a process that is then gone
        subjects = there.ask(partial(prepare, digits=run))
    lines = []
    for subject in subjects:
        with Aside(Ways, subject) as there:
            seconds, sizes = there.ask(take_turns)
        peaks = {}
        for way in subject.measured:
            with Aside(Path) as there:
                peaks[way] = there.ask(partial(peak_bytes, subject=replace(subject, ways=(way,))))
        results.metrics |= metrics_of(subject, seconds, peaks)
        results.details[subject.name] = {
            "seconds": seconds, "extra_peak_bytes": peaks, "decoder_parameters": sizes, "batch": subject.batch
        }  # fmt: skip
        lines += lines_of(subject, seconds, peaks, sizes)
    print(table(("student", "way", "seconds (least to most)", "of sft", "MB beyond imports", "of sft"), lines))
    results.print(as_json=as_json)


def metrics_of(subject: Subject, seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, float]:
    """Ratios by the names of the issue; those of the digits' and the small student carry their names."""
    own = "" if subject.name == "smol" else f"{subject.name}_"
    found = {f"{own}time_over_sft": ratio(seconds["response"], seconds["sft"])}
    for way in BESIDE:
        if way in seconds:
            found[f"{own}time_over_sft_{way.rsplit(' ', 1)[-1]}"] = ratio(seconds[way], seconds["sft"])
    for way, peak in peaks.items():
        if way == "response":
            found[f"{own}memory_over_sft"] = peak / peaks["sft"]
        elif way in BESIDE:
            found[f"{own}memory_over_sft_{way.rsplit(' ', 1)[-1]}"] = peak / peaks["sft"]
    own = "" if subject.name == "small" else f"{subject.name}_"  # a real vocabulary, and all three teachers
    for way in seconds:
        if way in IN_MEMORY:
            name = way.replace(" ", "_")
            found[f"{own}speedup_over_{name}"] = ratio(seconds[way], seconds["response"])
            if way in peaks:
                found[f"{own}memory_of_{name}"] = peaks[way] / peaks["response"]
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def lines_of(
    subject: Subject, seconds: dict[str, list[float]], peaks: dict[str, int], sizes: dict[str, int]
) -> list[list[str]]:
    """A row for each way."""
    lines = []
    for way, taken in seconds.items():
        size = sizes[way if way in IN_MEMORY else "student"]
        memory = [f"{peaks[way] / 1e6:.0f}", f"{peaks[way] / peaks['sft']:.2f}"] if way in peaks else ["", ""]
        spread = f"{statistics.median(taken):.3f} ({min(taken):.3f}–{max(taken):.3f})"
        name = f"{way} ({size / 1e6:.1f} M)" if way in IN_MEMORY else way
        lines.append([f"{subject.name}, {sizes['student'] / 1e6:.1f} M", name, spread,
                      f"{ratio(taken, seconds['sft']):.3f}", *memory])  # fmt: skip
    return lines


def prepare(run: Path, *, digits: Path) -> list[Subject]:
    """Models and caches, those that are there already left as they are."""
    whole, rows = (*LOSSES, *IN_MEMORY), ("sft", "response")
    digits_cache, text_cache = run / "cache-digits", run / "cache-text"
    if not (digits_cache / "manifest.json").exists():
        _cache(digits_cache, digits / "cache", digits / "models/teacher")
    smol, small = run / "smol", run / "small"
    smol_llava.save_smol_llava(smol)
    if not small.exists():
        smol_llava.save_small_llava(small, logit_std=0.32, hidden=256, layers=8)
    if not (text_cache / "manifest.json").exists():
        _cache(text_cache, _tokens(run, smol), smol)
    return [
        Subject(
            "digits", digits / "models/student_init_0", digits_cache, batch=32, rounds=15, ways=whole, measured=rows
        ),
        Subject("smol", smol, text_cache, batch=4, rounds=5, ways=tuple(LOSSES), measured=(*rows, BESIDE[-1])),
        Subject("small", small, text_cache, batch=4, rounds=5, ways=(*rows, *IN_MEMORY), measured=(*rows, *IN_MEMORY)),
    ]


def _cache(folder: Path, tokens: Path, teacher: Path) -> None:
    asked = Asked.open(tokens, teacher)
    write_cache(folder, asked, ask_teacher(asked, SPLIT), CACHE)


def _tokens(run: Path, model: Path) -> Path:
    """The questions as token ids, no teacher asked."""
    tokenizer = load_tokenizer(model)
    source = smol_llava.write_questions(
        run / "data", num_samples=NUM_SAMPLES, num_images=NUM_IMAGES, answer_tokens=ANSWER_TOKENS, tokenizer=tokenizer
    )
    settings = DumpSettings(
        run=run,
        data=DataSection(sources=(SourceSection(path=str(source), split=SPLIT),)),
        teacher=TeacherSection(model=str(model), dtype="float32", max_length=512),
        dump=DumpSection(),
        cache=CacheSection(path=str(run / "tokens"), families=()),
    )
    return Path(run_dump(settings, progress=False).cache)


if __name__ == "__main__":
    main()
