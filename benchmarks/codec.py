"""What a cached row costs on disk and loses, and how fast it is written and read: `python -m benchmarks.codec`.

Rows of a text model as they are (`natural`) and peaked, and of the digits teacher: 8,192 each, stored as a
part's response file in several settings, read back, and measured against the dense rows. Bytes are the whole
file over its rows: ids, values, scalars, offsets, Parquet's own. The metrics are of the default setting.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks import digits_rows, text_rows
from benchmarks.results import Results, table, wants_json
from benchmarks.text_rows import Student, TeacherRows, logit_chunks
from storage.config import SelectionSection
from storage.encoding.distributions import RowFormat, decode_group, decode_id_groups, encode_groups
from storage.encoding.parquet_schema import encode_parquet
from storage.encoding.tail_profile import encode_tail_total
from storage.records.records import TailTotal
from storage.records.sparse_rows import SparseRows
from storage.selection import Mass, Sampled, Selection, Threshold, TopK
from teacher_dump.signals.sparsify import make_row_uniforms, select_blocks, select_rows

ROWS_PER_SAMPLE = {"digits": 8}  # of the others, a sequence: 512
ZSTD_LEVEL = 9
TIMED_RUNS = 7
DEFAULT = SelectionSection()


@dataclass(frozen=True)
class Setting:
    """One way to keep rows."""

    selection: Selection
    rounding_kl: float = DEFAULT.rounding_kl
    draw_sets: int = 1

    @property
    def tau(self) -> float:
        return self.selection.draw_weight

    def __str__(self) -> str:
        match self.selection:
            case Threshold(tau):
                name = f"threshold {tau:g}"
            case TopK(k):
                name = f"top-{k}"
            case Mass(mass):
                name = f"mass {mass:g}"
            case Sampled(draws):
                name = f"sampled {draws} (RS-KD)"
            case other:
                name = str(other)
        name += f", {self.draw_sets} sets" if self.draw_sets > 1 else ""
        return name if self.rounding_kl == DEFAULT.rounding_kl else f"{name}, rounding {self.rounding_kl:g}"


USUAL = Setting(Threshold(DEFAULT.tau))
SETTINGS: Mapping[str, tuple[Setting, ...]] = {
    "natural": (
        USUAL,
        *(Setting(Threshold(tau)) for tau in (0.004, 0.02, 0.04)),
        *(Setting(Threshold(DEFAULT.tau), kl) for kl in (0.0, 5e-5, 2e-3)),
        *(Setting(Threshold(DEFAULT.tau), draw_sets=sets) for sets in (2, 4)),
        Setting(Mass(0.9)),
        Setting(Sampled(50)),
        Setting(TopK(50)),
        Setting(TopK(128)),
    ),
    "peaked": (USUAL, *(Setting(Threshold(tau)) for tau in (0.002, 0.004, 0.02)), Setting(Sampled(50))),
    "digits": (USUAL, *(Setting(Threshold(tau)) for tau in (0.001, 0.004)), Setting(Sampled(50))),
}


@dataclass(frozen=True, eq=False)
class Stored:
    """A file of rows, and what was read back from it."""

    content: bytes
    kept: RowFormat
    written: SparseRows
    read: SparseRows

    @property
    def bytes_per_row(self) -> float:
        return len(self.content) / self.read.num_rows


def select_all(teacher: TeacherRows, settings: tuple[Setting, ...]) -> dict[Setting, SparseRows]:
    """Every setting's rows, in one pass over the teacher's logits."""
    most = max(setting.draw_sets for setting in settings)
    uniforms = make_row_uniforms(len(teacher.hidden), seed=0, family="response", key=teacher.name, num_sets=most)
    selections = dict.fromkeys((setting.selection, setting.draw_sets) for setting in settings)
    parts: dict[tuple[Selection, int], list[SparseRows]] = {selection: [] for selection in selections}
    for rows, logits in teacher.logits():
        for selection, sets in selections:
            labels, draws = teacher.labels[rows], uniforms[rows, :sets]
            selected = select_rows(logits, labels=labels, selection=selection, uniforms=draws)
            parts[selection, sets].append(selected)
    whole = {selection: SparseRows.concatenate(each) for selection, each in parts.items()}
    return {setting: whole[setting.selection, setting.draw_sets] for setting in settings}


def tail_total_bytes(teacher: TeacherRows) -> int:
    """What the sum of all rows' tails, at the usual setting, adds to the file of a part that keeps it."""
    total = torch.zeros(teacher.vocab_size, dtype=torch.float64)
    uniforms = np.zeros(len(teacher.hidden))
    for rows, logits in teacher.logits():
        draws = uniforms[rows]
        selected = select_blocks(logits, labels=None, selection=USUAL.selection, uniforms=draws, sums_tails=True)
        assert selected.tail_sum is not None
        total += selected.tail_sum
    return len(encode_tail_total(TailTotal(total.numpy(), len(teacher.hidden))))


def cut(rows: SparseRows, size: int) -> list[SparseRows]:
    """Samples of `size` rows."""
    return [rows.slice(start, min(start + size, rows.num_rows)) for start in range(0, rows.num_rows, size)]


def write(samples: list[SparseRows], kept: RowFormat) -> bytes:
    """A part's response file of some samples."""
    keys = [{"sample_id": f"sample-{number:06d}"} for number in range(len(samples))]
    groups = encode_groups(keys, samples, kept)
    return encode_parquet("response", groups.groups, zstd_level=ZSTD_LEVEL, metadata=groups.metadata)


def read(content: bytes, kept: RowFormat) -> SparseRows:
    """All rows of such a file, as a reader gets them: row group by row group."""
    file = pq.ParquetFile(pa.BufferReader(content))
    groups = decode_id_groups(file.metadata.metadata, kept.vocab_size)
    parts = []
    for number in range(file.metadata.num_row_groups):
        group = file.read_row_group(number, use_threads=False)
        parts.append(decode_group(group, groups, kept.num_temperatures, num_sets=kept.num_sets)[0])
    return SparseRows.concatenate(parts)


def store(rows: SparseRows, setting: Setting, teacher: TeacherRows) -> Stored:
    """Rows written to a file and read back."""
    kept = RowFormat(teacher.vocab_size, setting.tau, setting.rounding_kl, 0, setting.draw_sets)
    content = write(cut(rows, ROWS_PER_SAMPLE.get(teacher.name, text_rows.LENGTH)), kept)
    return Stored(content, kept, rows, read(content, kept))


def gradient_error(rows: SparseRows, student: Student) -> float:
    """||sum (p^ - p) h^T|| / ||sum (q - p) h^T||, Frobenius, over all rows."""
    sparse = torch.zeros_like(student.dense_target)
    entry_rows = torch.from_numpy(rows.row_of_entry())
    weights = torch.from_numpy(np.exp(rows.logprobs))
    for start in range(0, rows.num_entries, 1 << 16):
        part = slice(start, start + (1 << 16))
        sparse.index_add_(
            0,
            torch.from_numpy(rows.ids[part].astype(np.int64)),
            weights[part, None] * student.hidden[entry_rows[part]],
        )
    return float((sparse - student.dense_target).double().norm()) / student.gradient_norm


def row_error(rows: SparseRows, teacher: TeacherRows, student_weight: Tensor) -> float:
    """The mean over rows of ||p^ - p|| / ||q - p||."""
    student = teacher.students[0]
    total = 0.0
    chunks = zip(teacher.logits(), logit_chunks(student.hidden, student_weight, teacher.scale), strict=True)
    for (span, ours), (_, theirs) in chunks:
        p, q = ours.softmax(-1), theirs.softmax(-1)
        part = rows.slice(span.start, min(span.stop, rows.num_rows))
        decoded = torch.zeros_like(p)
        entry_rows = torch.from_numpy(part.row_of_entry())
        decoded[entry_rows, torch.from_numpy(part.ids.astype(np.int64))] = torch.from_numpy(np.exp(part.logprobs))
        total += float(((decoded - p).norm(dim=1) / (q - p).norm(dim=1).clamp_min(1e-9)).sum())
    return total / rows.num_rows


def bucketed_kl(stored: Stored) -> float:
    """Mean KL of the exact entries and one bucket for the rest, between what was written and what is read."""
    written, got = stored.written, stored.read
    order = [np.lexsort((rows.ids, ~rows.is_exact(), rows.row_of_entry())) for rows in (written, got)]
    exact = written.is_exact()[order[0]]
    assert (written.ids[order[0]] == got.ids[order[1]]).all()
    p, q = (rows.logprobs[at][exact].astype(np.float64) for rows, at in zip((written, got), order, strict=True))
    tail_p, tail_q = (np.maximum(rows.tail_mass.astype(np.float64), 1e-30) for rows in (written, got))
    head = float((np.exp(p) * (p - q)).sum())
    return (head + float((tail_p * np.log(tail_p / tail_q)).sum())) / written.num_rows


def rate(work: Callable[[], object], num_rows: int) -> tuple[float, float]:
    """Rows a second, the median of several runs, and half the spread of the middle ones as a share of it."""
    times = []
    for _ in range(TIMED_RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
    return num_rows / float(middle), float((high - low) / 2 / middle)


def measure(teacher: TeacherRows, student_weight: Tensor, results: Results) -> dict[Setting, Stored]:
    """Every setting of a teacher, as a table and as details."""
    rows = select_all(teacher, SETTINGS[teacher.name])
    stored, lines = {}, []
    for setting, selected in rows.items():
        found = store(selected, setting, teacher)
        stored[setting] = found
        exact = float(found.read.num_exact.mean())
        line = {
            "setting": str(setting),
            "bytes_per_row": round(found.bytes_per_row, 2),
            "exact": round(exact, 2),
            "sampled": round(found.read.num_entries / found.read.num_rows - exact, 2),
            "rounding_kl": float(f"{bucketed_kl(found):.3g}"),
            **{
                f"gradient_error, student {student.name}": float(f"{gradient_error(found.read, student):.3g}")
                for student in teacher.students
            },
        }
        if setting == USUAL:
            line["row_error"] = float(f"{row_error(found.read, teacher, student_weight):.3g}")
        lines.append(line)
    header = list(lines[0])
    print(f"\n{teacher.name}, {len(teacher.hidden)} rows, vocabulary {teacher.vocab_size}")
    print(table(header, [[line.get(name, "") for name in header] for line in lines]))
    results.details[teacher.name] = lines
    results.details[f"tail_total_bytes_{teacher.name}"] = tail_total_bytes(teacher)
    print(f"a part that keeps its tails has {results.details[f'tail_total_bytes_{teacher.name}']:,} bytes more")
    return stored


def main() -> None:
    """Measure, print, and exit."""
    as_json = wants_json(__doc__ or "")
    torch.manual_seed(0)
    results = Results("codec")
    texts, tokens = text_rows.read(print)
    results.details["text_sha256"] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    usual: dict[str, Stored] = {}
    for teacher in texts:
        found = measure(teacher, teacher.weight, results)
        usual[teacher.name] = found[USUAL]
        results.metrics[f"bytes_{teacher.name}"] = found[USUAL].bytes_per_row
        results.metrics[f"gradient_error_{teacher.name}"] = gradient_error(found[USUAL].read, teacher.students[0])
        for setting, stored in found.items():
            if isinstance(setting.selection, TopK):
                results.metrics[f"bytes_topk{setting.selection.k}"] = stored.bytes_per_row
                results.metrics[f"kl_topk{setting.selection.k}"] = bucketed_kl(stored)
    digits = digits_rows.read(Path("runs/digits"), print)
    found = measure(digits, digits.weight, results)
    results.metrics["bytes_digits"] = found[USUAL].bytes_per_row
    results.metrics["gradient_error_digits"] = gradient_error(found[USUAL].read, digits.students[0])
    natural = usual["natural"]
    samples = cut(natural.written, text_rows.LENGTH)
    torch.set_num_threads(1)
    for name, work in (
        ("decode_rows_per_s", lambda: read(natural.content, natural.kept)),
        ("encode_rows_per_s", lambda: write(samples, natural.kept)),
    ):
        results.metrics[name], spread = rate(work, natural.read.num_rows)
        results.details[name] = {"runs": TIMED_RUNS, "spread": spread}
    results.print(as_json=as_json)


if __name__ == "__main__":
    main()
