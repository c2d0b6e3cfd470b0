"""How fast training reads a cache: `python -m benchmarks.loader`.

Natural rows of a text model (SmolLM2-135M, see text_rows) in answers of about 100 tokens, read in shuffled batches:
against the bare decoder on one core, with memory for a part of the cache alone, against loaders that keep plain
arrays, and how soon the first batch of a cache of 1,000 parts with images is there.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks import loader_peers, text_rows
from benchmarks.results import Results, table, wants_json
from storage.config import SelectionSection
from storage.encoding.distributions import decode_group, decode_id_groups
from storage.identity import FORMAT_VERSION, Identity
from storage.reader.cache import Cache
from storage.reader.prefetch import shuffled_batches
from storage.reader.shuffle import WINDOW_ROWS
from storage.records.records import ImageRef, PartRecords, RelationMatrix, TokensRecord, compute_image_key
from storage.records.sample_key import SampleKey
from storage.records.sparse_rows import SparseRows
from storage.selection import Threshold
from storage.writer.cache_writer import CacheWriter
from teacher_dump.signals.sparsify import make_row_uniforms, select_rows

NUM_ROWS = 2048  # of the model; answers are runs of them
VOCAB_SIZE = 49_152
SAMPLES_PER_PART, NUM_PARTS = 256, 16
MEAN_ANSWER = 100  # tokens
MANY_PARTS, SAMPLES_PER_SMALL_PART, VISUAL_TOKENS = 1000, 4, 64
BATCH = 32
RUNS = 3
EPOCHS = 3
DEFAULT = SelectionSection()


def natural_rows() -> SparseRows:
    """Rows as a dump selects them by default."""
    model, tokens = text_rows.model_and_tokens()
    tokens = tokens[: NUM_ROWS // text_rows.LENGTH]
    hidden = text_rows.hidden_states(model, tokens)
    labels = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1).flatten()
    uniforms = make_row_uniforms(len(hidden), seed=0, family="response", key="natural")
    selection = Threshold(DEFAULT.tau)
    with torch.no_grad():
        chunks = text_rows.logit_chunks(hidden, model.lm_head.weight)
        return SparseRows.concatenate(
            [
                select_rows(logits, labels=labels[rows], selection=selection, uniforms=uniforms[rows])
                for rows, logits in chunks
            ]
        )


def write_cache(folder: Path, rows: SparseRows, *, num_parts: int, samples: int, images: bool) -> None:
    """A sealed cache of answers, of one image each where there are images, with all their families."""
    families = ("response", "visual", "relation") if images else ("response",)
    writer = CacheWriter.open(folder, _identity(num_parts, families), families)
    with ThreadPoolExecutor(4) as pool:  # waits for the disk, mostly
        for _ in pool.map(lambda part: writer.write_part(part, _part(part, rows, samples, images)), range(num_parts)):
            pass
    writer.seal()


def _identity(num_parts: int, families: tuple[str, ...]) -> Identity:
    rows = {"method": DEFAULT.method, "tau": DEFAULT.tau, "rounding_kl": DEFAULT.rounding_kl}
    return Identity(
        format_version=FORMAT_VERSION, teacher="SmolLM2-135M-Instruct", teacher_fingerprint="a" * 64, dtype="float32",
        engine="transformers", vocab_size=VOCAB_SIZE, tokenizer_fingerprint="b" * 64, chat_template_fingerprint="c",
        image_preprocessing_fingerprint="d" * 64, image_token_id=VOCAB_SIZE - 1, eos_token_ids=(2,),
        plan_fingerprint="e" * 64, num_parts=num_parts, image_root="",
        selection={"response": rows, **({"visual": rows, "relation": {}} if "relation" in families else {})},
    )  # fmt: skip


def _part(part: int, rows: SparseRows, samples: int, images: bool) -> PartRecords:
    rng = np.random.default_rng(part)
    tokens, response, visual, relation = [], [], {}, {}
    for sample in range(samples):
        answer, prompt = int(np.clip(rng.gamma(2, MEAN_ANSWER / 2), 4, 512)), int(rng.integers(16, 64))
        token_ids = rng.integers(3, VOCAB_SIZE - 1, prompt + answer).astype(np.int32)
        refs = ()
        if images:
            token_ids[1] = VOCAB_SIZE - 1
            sha256 = f"{part * samples + sample:064x}"
            key = compute_image_key(token_ids[:2], [sha256], "d" * 64)
            refs = (ImageRef(f"{part}/{sample}.png", sha256, VISUAL_TOKENS, key),)
            visual[key] = _run_of(rows, VISUAL_TOKENS, rng, labels=False)
            gram = np.corrcoef(rng.normal(size=(VISUAL_TOKENS, 16)))
            relation[key] = RelationMatrix((gram / np.linalg.norm(gram)).astype(np.float32), 1.0)
        mask = np.arange(len(token_ids)) >= prompt
        tokens.append(TokensRecord(SampleKey(f"{part}-{sample}"), "train", "", token_ids, mask, refs))
        response.append(_run_of(rows, answer, rng, labels=True))
    if not images:
        return PartRecords(tokens=tokens, response=response)
    return PartRecords(tokens=tokens, response=response, visual=visual, relation=relation)


def _run_of(rows: SparseRows, size: int, rng: np.random.Generator, *, labels: bool) -> SparseRows:
    start = int(rng.integers(rows.num_rows - size))
    run = rows.slice(start, start + size)
    return run if labels else SparseRows(**{**vars(run), "label_logprob": None})


def decode_rate(folder: Path) -> float:
    """Rows a second of the bare decoder on this core: row groups are read from disk before the clock starts."""
    groups = []
    for file in sorted((folder / "response").iterdir()):
        parquet = pq.ParquetFile(file)
        id_groups = decode_id_groups(parquet.metadata.metadata, VOCAB_SIZE)
        groups += [(parquet.read_row_group(group), id_groups) for group in range(parquet.num_row_groups)]
    start = time.perf_counter()
    num_rows = sum(decode_group(group, id_groups, 0)[0].num_rows for group, id_groups in groups)
    return num_rows / (time.perf_counter() - start)


def epoch(cache: Cache, number: int, *, window_rows: int = WINDOW_ROWS) -> tuple[float, float, int]:
    """Rows and samples a second of a shuffled epoch, and row groups read for it."""
    num_batches, before = -(-cache.num_samples // BATCH), cache.num_groups_read
    start = time.perf_counter()
    steps = range(number * num_batches, (number + 1) * num_batches)
    rows, samples = 0, 0
    for batch in shuffled_batches(cache, batch_size=BATCH, steps=steps, window_rows=window_rows):
        assert batch.response is not None
        rows += batch.response.num_rows
        samples += len(batch)
    seconds = time.perf_counter() - start
    return rows / seconds, samples / seconds, cache.num_groups_read - before


def first_batch_s(folder: Path) -> float:
    """From nothing to the first batch of a shuffled epoch."""
    start = time.perf_counter()
    batches = shuffled_batches(Cache.open(folder), batch_size=BATCH, steps=range(1))
    batch = next(batches)
    seconds = time.perf_counter() - start
    assert batch.response is not None
    assert batch.visual
    return seconds


def measure_epochs(folder: Path, results: Results) -> None:
    """The loader against the bare decoder, with memory for all and for a third of the cache."""
    whole = Cache.open(folder)
    rows_in_all = int(whole.num_response_rows.sum())
    found: dict[str, list[float]] = {"rate_over_decode": [], "rate_over_decode_small_memory": []}
    decoded_bytes, groups, bare = 0, (0, 0), 0.0
    for _ in range(RUNS):
        bare = decode_rate(folder)
        cache = Cache.open(folder, max_bytes=1 << 30)
        rate, _, groups_whole = epoch(cache, 0)
        decoded_bytes = cache.held_bytes
        small = Cache.open(folder, max_bytes=decoded_bytes // 3)
        small_rate, _, groups_small = epoch(small, 0, window_rows=rows_in_all // 5)
        found["rate_over_decode"].append(rate / bare)
        found["rate_over_decode_small_memory"].append(small_rate / bare)
        groups = groups_whole, groups_small
    for name, ratios in found.items():
        results.metrics[name] = float(np.median(ratios))
    results.metrics["groups_read_over_groups_small_memory"] = groups[1] / groups[0]
    results.details["epochs"] = {
        "rows": rows_in_all, "bytes_decoded": decoded_bytes, "small_memory_bytes": decoded_bytes // 3,
        "decode_rows_per_s": bare, "ratios": found,
    }  # fmt: skip


def measure_peers(folder: Path, scratch: Path, results: Results) -> None:
    """Samples a second of us and of each peer, epoch by epoch, the first with everything on disk."""
    cache = Cache.open(folder)
    ours = [epoch(cache, number)[1] for number in range(EPOCHS)]
    rates = {"stillhouse": ours}
    for peer in loader_peers.peers():
        rates[str(peer)] = loader_peers.epochs(peer, folder, scratch, batch_size=BATCH, num_epochs=EPOCHS)
    for library in ("mosaicml-streaming", "litdata"):
        theirs = {name: found for name, found in rates.items() if name.startswith(library)}
        advised = next(iter(theirs.values()))
        name = library.replace("-", "_")
        results.metrics[f"ratio_vs_{name}"] = over_epochs(ours) / over_epochs(advised)
        results.metrics[f"ratio_vs_{name}_first_epoch"] = ours[0] / advised[0]
        best = max(over_epochs(found) for found in theirs.values())
        results.metrics[f"ratio_vs_{name}_best_setting"] = over_epochs(ours) / best
    print(table(["samples a second", *(f"epoch {number}" for number in range(EPOCHS))],
                [[name, *(f"{rate:.0f}" for rate in found)] for name, found in rates.items()]))  # fmt: skip
    results.details["samples_per_s"] = rates
    places = {"stillhouse": folder, **{path.name: path for path in scratch.iterdir()}}
    results.details["bytes"] = {name: _bytes_in(path) for name, path in places.items()}


def over_epochs(rates: list[float]) -> float:
    """Samples a second over all epochs together."""
    return len(rates) / sum(1 / rate for rate in rates)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Measure, print, and exit."""
    as_json = wants_json(__doc__ or "")
    results = Results("loader")
    rows = natural_rows()
    with tempfile.TemporaryDirectory(prefix="stillhouse-loader-") as name:
        scratch = Path(name)
        write_cache(scratch / "many", rows, num_parts=MANY_PARTS, samples=SAMPLES_PER_SMALL_PART, images=True)
        results.metrics["first_batch_s"] = float(np.median([first_batch_s(scratch / "many") for _ in range(RUNS)]))
        shutil.rmtree(scratch / "many")
        folder = scratch / "cache"
        write_cache(folder, rows, num_parts=NUM_PARTS, samples=SAMPLES_PER_PART, images=False)
        measure_epochs(folder, results)
        measure_peers(folder, scratch / "peers", results)
    results.print(as_json=as_json)


if __name__ == "__main__":
    main()
