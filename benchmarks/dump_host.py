"""How many rows a second one core takes from selected entries to a committed part: the bound where a GPU selects.

The entries are the arrays of `SparseRows`, which share the memory of a selection's tensors. Natural rows of SmolLM2
(see `text_rows`), as a part of 256 samples of 64 answer tokens in the default selection.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import text_rows
from storage.config import SelectionSection
from storage.identity import Identity
from storage.records.records import PartRecords, TokensRecord
from storage.records.sample_key import SampleKey
from storage.records.sparse_rows import SparseRows
from storage.selection import Threshold
from storage.writer.cache_writer import CacheWriter
from teacher_dump.signals.sparsify import make_row_uniforms, select_rows

NUM_SAMPLES = 256
SAMPLE_ROWS = 64
RUNS = 7
_PROMPT = np.arange(8, dtype=np.int32)


def rows_per_s(folder: Path) -> tuple[list[float], list[float]]:
    """By repetition, a second of wall time and a second of processor time."""
    torch.set_num_threads(1)
    section = SelectionSection()
    rows, labels, vocab_size = _selected(NUM_SAMPLES * SAMPLE_ROWS, section.tau)
    identity = _identity(vocab_size, {"response": section.model_dump(mode="json")})
    wall, processor = [], []
    for _ in range(RUNS + 1):
        shutil.rmtree(folder, ignore_errors=True)
        writer = CacheWriter.open(folder, identity, ["response"])
        started, busy = time.perf_counter(), time.process_time()
        writer.write_part(0, _records(rows, labels))
        wall.append(rows.num_rows / (time.perf_counter() - started))
        processor.append(rows.num_rows / (time.process_time() - busy))
    return wall[1:], processor[1:]


def _selected(num_rows: int, tau: float) -> tuple[SparseRows, np.ndarray, int]:
    """Sparse rows, their labels, and the size of the vocabulary."""
    hidden, weight, labels = text_rows.natural(num_rows)
    uniforms = make_row_uniforms(num_rows, seed=0, family="response", key="host")
    parts = [
        select_rows(logits, labels=labels[span], selection=Threshold(tau), uniforms=uniforms[span])
        for span, logits in text_rows.logit_chunks(hidden, weight)
    ]
    return SparseRows.concatenate(parts), labels.numpy().astype(np.int32), len(weight)


def _records(rows: SparseRows, labels: np.ndarray) -> PartRecords:
    """The rows as samples of equal length."""
    starts = range(0, rows.num_rows, SAMPLE_ROWS)
    mask = np.concatenate([np.zeros(len(_PROMPT), bool), np.ones(SAMPLE_ROWS, bool)])
    tokens = [
        TokensRecord(
            SampleKey(f"{start:06d}"), "train", "", np.concatenate([_PROMPT, labels[start : start + SAMPLE_ROWS]]), mask
        )
        for start in starts
    ]
    return PartRecords(tokens, response=[rows.slice(start, start + SAMPLE_ROWS) for start in starts])


def _identity(vocab_size: int, selection: dict[str, dict[str, Any]]) -> Identity:
    return Identity(
        teacher="SmolLM2-135M",
        teacher_fingerprint="bench",
        dtype="float32",
        engine="bench",
        tokenizer_fingerprint="bench",
        vocab_size=vocab_size,
        chat_template_fingerprint="bench",
        image_preprocessing_fingerprint="bench",
        image_token_id=-1,
        eos_token_ids=(),
        plan_fingerprint="bench",
        num_parts=1,
        image_root=".",
        selection=selection,
    )
