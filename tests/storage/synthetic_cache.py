"""Small caches of made-up signals, for tests, and a process that writes one and can be killed at any moment.

python -m tests.storage.synthetic_cache FOLDER --parts 6 --noise 1 --die-at 17
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from storage.identity import Identity
from storage.images.settings import PixelSettings
from storage.records.records import (
    ImageRef,
    PartRecords,
    RelationMatrix,
    SampleError,
    TokensRecord,
    compute_image_key,
)
from storage.records.sample_key import SampleKey
from storage.records.sparse_rows import SparseRows
from storage.writer.cache_writer import CacheWriter

VOCAB_SIZE = 300
IMAGE_TOKEN = 7
TAU = 0.03
FAMILIES = ("response", "visual", "relation")
SAMPLES_PER_PART = 6


def make_identity(*, num_parts: int = 2, vocab_size: int = VOCAB_SIZE, tau: float = TAU, **changes) -> Identity:
    """An identity of a teacher that does not exist."""
    selection = {"method": "threshold", "k": 64, "tau": tau, "seed": 0}
    fields = {
        "teacher": "tiny",
        "teacher_fingerprint": "a" * 8,
        "dtype": "float32",
        "engine": "none 0",
        "tokenizer_fingerprint": "b" * 8,
        "vocab_size": vocab_size,
        "chat_template_fingerprint": "c" * 8,
        "image_preprocessing_fingerprint": "d" * 8,
        "pixels": PixelSettings(),
        "image_token_id": IMAGE_TOKEN,
        "eos_token_ids": (2,),
        "plan_fingerprint": "e" * 8,
        "num_parts": num_parts,
        "image_root": "images",
        "selection": {
            "response": selection,
            "visual": selection,
            "relation": {"centered": False},
        },
    }
    return Identity(**{**fields, **changes})


def make_logits(rng: np.random.Generator, num_rows: int, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """Raw logits, float64 (r, v), peaked to a degree that differs from row to row."""
    return rng.normal(size=(num_rows, vocab_size)) * rng.uniform(0.1, 6, size=(num_rows, 1))


def select(logits: np.ndarray, *, tau: float, rng: np.random.Generator, labels: bool) -> SparseRows:
    """The slow reference of threshold selection, row by row: p >= tau exactly, systematic draws below."""
    lists = []
    for row in logits:
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        p = np.exp(logprobs)
        exact = np.flatnonzero(p >= tau)
        exact = exact[np.argsort(-logprobs[exact], kind="stable")]
        rest = np.where(p >= tau, 0.0, p)
        points = np.floor(np.cumsum(rest) / tau + rng.uniform())
        draws = np.diff(points, prepend=0).astype(int)
        draws[p >= tau] = 0
        sampled = np.flatnonzero(draws)
        lists.append((exact, logprobs[exact], sampled, draws[sampled], rest.sum(), logprobs))
    sizes = [len(exact) + len(sampled) for exact, _, sampled, *_ in lists]
    return SparseRows(
        offsets=np.cumsum([0, *sizes]).astype(np.int64),
        ids=_join([np.concatenate([item[0], item[2]]) for item in lists], np.int32),
        logprobs=_join([np.concatenate([item[1], np.log(item[3] * tau)]) for item in lists], np.float32),
        num_exact=np.array([len(item[0]) for item in lists], np.int32),
        tail_mass=np.array([min(item[4], 1.0) for item in lists], np.float32),
        entropy=np.array([-(np.exp(item[5]) * item[5]).sum() for item in lists], np.float32),
        log_sum_exp=np.zeros((len(logits), 0), np.float32),
        label_logprob=np.array([item[5][0] for item in lists], np.float32) if labels else None,
    )


def top_k(logits: np.ndarray, k: int, *, labels: bool) -> SparseRows:
    """The k most probable tokens of each row, nothing sampled."""
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(logprobs, ids, axis=1)
    num_rows = len(logits)
    return SparseRows(
        offsets=np.arange(num_rows + 1, dtype=np.int64) * k,
        ids=ids.astype(np.int32).ravel(),
        logprobs=kept.astype(np.float32).ravel(),
        num_exact=np.full(num_rows, k, np.int32),
        tail_mass=np.clip(1 - np.exp(kept).sum(axis=1), 0, 1).astype(np.float32),
        entropy=-(np.exp(logprobs) * logprobs).sum(axis=1).astype(np.float32),
        log_sum_exp=np.zeros((num_rows, 0), np.float32),
        label_logprob=logprobs[:, 0].astype(np.float32) if labels else None,
    )


def make_relation(rng: np.random.Generator, n: int) -> RelationMatrix:
    """G / ||G|| of random visual rows."""
    rows = rng.normal(size=(n, 20)) * 30
    gram = rows @ rows.T
    norm = float(np.linalg.norm(gram))
    return RelationMatrix((gram / norm).astype(np.float32), norm)


def make_part(
    part: int, *, noise: int = 0, families: tuple[str, ...] = FAMILIES, num_samples: int = SAMPLES_PER_PART
) -> PartRecords:
    """Records of a part: texts alone, one and two images, a shared image, an empty answer, an error.

    Another `noise` gives other signals for the same samples, as a teacher that is not deterministic does.
    """
    rng = np.random.default_rng([part, noise])
    tokens, visual, relation = [], {}, {}
    for sample in range(num_samples):
        num_images = (1, 1, 0, 2)[sample % 4]
        shas = [f"{1000 * part + sample // 2 + 500 * image:064x}" for image in range(num_images)]
        ids = [1, *[IMAGE_TOKEN] * num_images, *range(20, 26 + sample)]
        mask = np.zeros(len(ids), bool)
        if sample % 5 != 4:  # the others have an empty answer
            mask[-3:] = mask[num_images + 1] = True
        images = []
        for image in range(num_images):
            key = compute_image_key(ids[: image + 2], shas[: image + 1], "d" * 8)
            num_visual_tokens = 4 + image
            images.append(ImageRef(f"set/{part}-{sample}-{image}.png", shas[image], num_visual_tokens, key))
            if key not in visual:
                visual[key] = select(make_logits(rng, num_visual_tokens), tau=TAU, rng=rng, labels=False)
                relation[key] = make_relation(rng, num_visual_tokens)
        tokens.append(
            TokensRecord(
                key=SampleKey(f"sample-{part}-{sample}"),
                split="test" if sample == 0 else "train",
                category="digit" if sample % 2 else "größe",
                token_ids=np.array(ids, np.int32),
                response_mask=mask,
                images=tuple(images),
            )
        )
    response = [
        select(make_logits(rng, record.num_response_tokens), tau=TAU, rng=rng, labels=True) for record in tokens
    ]
    return PartRecords(
        tokens=tokens,
        response=response if "response" in families else None,
        visual=visual if "visual" in families else None,
        relation=relation if "relation" in families else None,
        errors=[SampleError(f"broken-{part}", "image is truncated")],
    )


def write_cache(
    folder: str | Path,
    *,
    num_parts: int = 2,
    noise: int = 0,
    families: tuple[str, ...] = FAMILIES,
    num_samples: int = SAMPLES_PER_PART,
    **identity: Any,
) -> CacheWriter:
    """A whole, sealed cache."""
    writer = CacheWriter.open(folder, make_identity(num_parts=num_parts, **identity), families)
    for part in range(num_parts):
        records = make_part(part, noise=noise, families=families, num_samples=num_samples)
        writer.write_part(part, records)
    writer.seal()
    return writer


def _join(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0), *arrays]).astype(dtype)


def _die_at(event_number: int, folder: str) -> None:
    """Kill this process, as the kernel would, before its n-th file operation inside the folder."""
    counter = itertools.count(1)

    def watch(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.link", "os.remove"):
            return
        if folder in str(arguments[0]) and next(counter) == event_number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--parts", type=int, required=True)
    parser.add_argument("--noise", type=int, default=0)
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--start-when", type=Path, default=None)  # this file exists
    parser.add_argument("--wait-before-part", type=int, default=None)  # for ever: it is to be killed
    arguments = parser.parse_args()
    records = [make_part(part, noise=arguments.noise) for part in range(arguments.parts)]
    if arguments.die_at:
        _die_at(arguments.die_at, arguments.folder)
    if arguments.start_when:
        Path(f"{arguments.start_when}.ready-{os.getpid()}").touch()
        while not arguments.start_when.exists():
            pass
    writer = CacheWriter.open(arguments.folder, make_identity(num_parts=arguments.parts), FAMILIES)
    for part in sorted(set(range(arguments.parts)) - writer.committed_parts()):
        while part == arguments.wait_before_part:
            time.sleep(1)
        writer.write_part(part, records[part])
    writer.seal()


if __name__ == "__main__":
    main()
