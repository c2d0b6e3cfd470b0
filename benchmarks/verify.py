"""How fast a cache is verified: `python -m benchmarks.verify`.

Three caches on local disk, of made-up signals of realistic sizes: `llava_kd` (response and visual rows, and
float16 triangles of relation matrices, of 576 visual tokens), `response` (response rows alone, long answers) and
`hidden` (float16 hidden states of 2,048 numbers). Each run reads everything anew, from the page cache. Beside
it, in the same process: sha256 over the same bytes, and a reader that decodes every sample, each on one core.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.results import Results, table, wants_json
from storage.config import SelectionSection
from storage.encoding.output_head import make_head
from storage.identity import Identity
from storage.reader.cache import Cache
from storage.records.records import ImageRef, PartRecords, RelationMatrix, TokensRecord, compute_image_key
from storage.records.sample_key import SampleKey
from storage.records.sparse_rows import SparseRows
from storage.selection import Threshold
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from teacher_dump.signals.sparsify import make_row_uniforms, select_rows

VOCAB_SIZE = 32_000
IMAGE_TOKEN = VOCAB_SIZE
NUM_VISUAL_TOKENS = 576
WIDTH = 2048
DISTINCT_ROWS = 12_288
TIMED_RUNS = 5
SELECTION = SelectionSection()
SHAPES = {  # families, parts, samples a part, answer tokens a sample
    "llava_kd": (("response", "visual", "relation"), 6, 64, 80),
    "response": (("response",), 4, 1024, 150),
    "hidden": (("hidden",), 4, 128, 100),
}


def main() -> None:
    as_json = wants_json(__doc__ or "")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = Results("verify")
    rows = make_rows(DISTINCT_ROWS)
    results.details["entries_per_row"] = rows.num_entries / rows.num_rows
    lines = []
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            write_cache(Path(folder), name, rows)
            lines.append(measure(Path(folder), name, results))
    print(table(["cache", "MB", "verify MB/s", "sha256 MB/s", "reader MB/s", "rows/s"], lines))
    results.print(as_json=as_json)


def measure(folder: Path, name: str, results: Results) -> list[str]:
    """Adds a cache's metrics; returns its line of the table."""
    report = verify(folder)
    if not report.ok:
        raise AssertionError(report.problems)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    timed: dict[str, list[float]] = {"verify": [], "sha256": [], "reader": []}
    steps: dict[str, Callable[[], object]] = {
        "verify": lambda: verify(folder),
        "sha256": lambda: [hashlib.sha256(path.read_bytes()).digest() for path in files],
        "reader": lambda: read_all(folder),
    }
    for _ in range(TIMED_RUNS):
        for step, act in steps.items():
            started = time.perf_counter()
            act()
            timed[step].append(time.perf_counter() - started)
    rates = {step: megabytes / median(seconds) for step, seconds in timed.items()}
    rows_per_s = sum(report.num_rows.values()) / median(timed["verify"])
    results.metrics |= {
        f"{name}_mb_per_s": rates["verify"],
        f"{name}_over_sha256": rates["verify"] / rates["sha256"],
        f"{name}_over_reader": rates["verify"] / rates["reader"],
        f"{name}_rows_per_s": rows_per_s,
    }
    results.details[name] = {"megabytes": megabytes, "seconds": timed}
    shown = [f"{rates[step]:.0f}" for step in steps]
    return [name, f"{megabytes:.0f}", *shown, f"{rows_per_s:,.0f}"]


def read_all(folder: Path) -> None:
    """What a training run's reader does with each sample."""
    cache = Cache.open(folder, checksums=False)
    for index in range(cache.num_samples):
        cache.read(index)


def write_cache(folder: Path, name: str, rows: SparseRows) -> None:
    """A sealed cache of one shape; rows come from `rows`, in another order for each sample."""
    families, num_parts, num_samples, num_answer_tokens = SHAPES[name]
    writer = CacheWriter.open(folder, identity(families, num_parts), families)
    if "hidden" in families:
        rng = np.random.default_rng(1)
        writer.put_head(make_head(rng.normal(size=(VOCAB_SIZE // 8, WIDTH)).astype(np.float32)))
    matrices = make_relations(8) if "relation" in families else []
    for part in range(num_parts):
        writer.write_part(part, make_part(part, families, num_samples, num_answer_tokens, rows, matrices))
    writer.seal()


def make_part(
    part: int,
    families: tuple[str, ...],
    num_samples: int,
    num_answer_tokens: int,
    rows: SparseRows,
    matrices: list[RelationMatrix],
) -> PartRecords:
    rng = np.random.default_rng([part, 0])
    tokens, response, hidden = [], [], []
    visual: dict[str, SparseRows] = {}
    relation: dict[str, RelationMatrix] = {}
    for number in range(num_samples):
        sample_id = f"{part:04d}{number:08d}"
        prompt, images = rng.integers(0, 4000, 40).tolist(), ()
        if matrices:
            sha256 = hashlib.sha256(sample_id.encode()).hexdigest()
            prompt[8] = IMAGE_TOKEN
            key = compute_image_key(prompt[:9], [sha256], "d" * 8)
            images = (ImageRef(f"train2017/{sample_id}.jpg", sha256, NUM_VISUAL_TOKENS, key),)
            relation[key] = matrices[number % len(matrices)]
            visual[key] = some_rows(rng, rows, NUM_VISUAL_TOKENS, labels=False)
        length = int(rng.integers(num_answer_tokens // 2, num_answer_tokens * 3 // 2))
        ids = np.array([*prompt, *rng.integers(0, 4000, length)], np.int32)
        tokens.append(TokensRecord(SampleKey(sample_id), "train", "", ids, np.arange(len(ids)) >= len(prompt), images))
        if "response" in families:
            response.append(some_rows(rng, rows, length, labels=True))
        if "hidden" in families:
            hidden.append(rng.normal(size=(length, WIDTH)).astype(np.float32))
    return PartRecords(
        tokens=tokens,
        response=response if "response" in families else None,
        visual=visual if "visual" in families else None,
        relation=relation if "relation" in families else None,
        hidden=hidden if "hidden" in families else None,
    )


def some_rows(rng: np.random.Generator, rows: SparseRows, count: int, *, labels: bool) -> SparseRows:
    """Neighbouring rows from a random place."""
    start = int(rng.integers(0, rows.num_rows - count))
    some = rows.slice(start, start + count)
    if labels:
        return some
    return SparseRows(
        some.offsets, some.ids, some.logprobs, some.num_exact, some.tail_mass, some.entropy, some.log_sum_exp
    )


def make_rows(num_rows: int) -> SparseRows:
    """Threshold rows of a Zipf vocabulary whose entropy varies as that of text: about 10 exact ids, 30 sampled."""
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(1 << 22, dtype=np.float32)  # of which each row takes a stretch
    frequency = -np.log(np.arange(VOCAB_SIZE, dtype=np.float32) + 3)
    parts = []
    for start in range(0, num_rows, 1024):
        places = rng.integers(0, len(pool) - VOCAB_SIZE, min(1024, num_rows - start))
        noise = np.stack([pool[place : place + VOCAB_SIZE] for place in places])
        noise *= rng.uniform(3, 7, (len(places), 1)).astype(np.float32)
        logits = torch.from_numpy(noise + frequency)
        labels = torch.multinomial(logits.softmax(dim=1), 1)[:, 0]
        uniforms = make_row_uniforms(len(places), seed=0, family="response", key=str(start))
        parts.append(select_rows(logits, labels=labels, selection=Threshold(SELECTION.tau), uniforms=uniforms))
    return SparseRows.concatenate(parts)


def make_relations(count: int) -> list[RelationMatrix]:
    """Gram matrices of visual rows of some rank."""
    rng = np.random.default_rng(0)
    matrices = []
    for _ in range(count):
        states = rng.normal(size=(NUM_VISUAL_TOKENS, 64)) @ rng.normal(size=(64, 512))
        gram = states @ states.T
        norm = float(np.linalg.norm(gram))
        matrices.append(RelationMatrix((gram / norm).astype(np.float32), norm))
    return matrices


def identity(families: tuple[str, ...], num_parts: int) -> Identity:
    """An identity of a teacher that does not exist, with the default selections."""
    distribution = SELECTION.model_dump(mode="json", exclude={"k", "mass", "draws"})
    selection = {
        "response": distribution,
        "visual": distribution,
        "relation": {"centered": False, "encoding": "triangle_fp16"},
        "hidden": {"encoding": "float16"},
    }
    return Identity(
        teacher="none",
        teacher_fingerprint="a" * 8,
        dtype="bfloat16",
        engine="none 0",
        tokenizer_fingerprint="b" * 8,
        vocab_size=VOCAB_SIZE // 8 if "hidden" in families else VOCAB_SIZE,
        chat_template_fingerprint="c" * 8,
        image_preprocessing_fingerprint="d" * 8,
        image_token_id=IMAGE_TOKEN,
        eos_token_ids=(2,),
        plan_fingerprint="e" * 8,
        num_parts=num_parts,
        image_root="images",
        selection={family: selection[family] for family in families},
    )


if __name__ == "__main__":
    main()
