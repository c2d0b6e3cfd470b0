"""A small cache of the families relation, sequence, hidden and images: a preference pair, shared images, texts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from storage.encoding.output_head import StoredHead, make_head
from storage.identity import Identity
from storage.records.records import (
    ImageRef,
    PartRecords,
    RelationMatrix,
    SequenceLogprob,
    TokensRecord,
    compute_image_key,
)
from storage.records.sample_key import Half, SampleKey
from storage.writer.cache_writer import CacheWriter
from tests.storage.synthetic_cache import IMAGE_TOKEN, VOCAB_SIZE, make_identity, make_relation

WIDTH = 12
FAMILIES = ("relation", "sequence", "hidden", "images")
PROMPT = [1, IMAGE_TOKEN, 20, 21]
SAMPLES: tuple[
    tuple[str, Half | None, int | None, list[int], list[int]], ...
] = (  # id, half of a pair, image number, prompt, answer
    ("text", None, None, [1, 20, 21], [30, 31]),
    ("silent", None, 0, PROMPT, []),
    ("shared", None, 0, [1, IMAGE_TOKEN, 22], [30, 31, 32]),
    ("pair", "chosen", 1, PROMPT, [30, 33]),
    ("pair", "rejected", 1, PROMPT, [40, 41, 42]),
)


def make_family_identity(*, num_parts: int = 2, **selection: Any) -> Identity:
    chosen = {"relation": {"centered": False, "encoding": "low_rank"}, "hidden": {"encoding": "float16"}, **selection}
    return make_identity(num_parts=num_parts, selection=chosen)


def make_output_head(seed: int = 0) -> StoredHead:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(VOCAB_SIZE, WIDTH)).astype(np.float32)
    return make_head(weight, rng.normal(size=VOCAB_SIZE).astype(np.float32), scale=0.5, soft_cap=20.0)


def make_flat_relation(rng: np.random.Generator, n: int) -> RelationMatrix:
    """G / ||G|| of rows in a plane: two columns of a factor hold it."""
    rows = rng.normal(size=(n, 2)) @ rng.normal(size=(2, 20))
    gram = rows @ rows.T
    norm = float(np.linalg.norm(gram))
    return RelationMatrix((gram / norm).astype(np.float32), norm)


def make_image_file(part: int, number: int) -> bytes:
    return np.random.default_rng([part, number]).bytes(300 + 50 * number)


def make_family_part(part: int) -> PartRecords:
    """Records of the samples above, ids suffixed by the part where they are no pair's."""
    rng = np.random.default_rng([7, part])
    tokens, relation, images = [], {}, {}
    for row_id, half, number, prompt, answer in SAMPLES:
        refs = ()
        if number is not None:
            content = make_image_file(part, number)
            sha256 = hashlib.sha256(content).hexdigest()
            images[sha256] = content
            key = compute_image_key(prompt[:2], [sha256], "d" * 8)
            refs = (ImageRef(f"{part}-{number}.png", sha256, 9, key),)
            if key not in relation:
                relation[key] = make_relation(rng, 9) if number else make_flat_relation(rng, 9)
        key = SampleKey(f"{part}-{row_id}", half)
        mask = np.array([False] * len(prompt) + [True] * len(answer))
        tokens.append(TokensRecord(key, "train", "", np.array(prompt + answer, np.int32), mask, refs))
    return PartRecords(
        tokens=tokens,
        relation=relation,
        hidden=[rng.normal(size=(record.num_response_tokens, WIDTH)).astype(np.float32) for record in tokens],
        sequence=[
            SequenceLogprob(float(np.float32(-1.5 * record.num_response_tokens)), record.num_response_tokens)
            for record in tokens
        ],
        images=images,
    )


def write_family_cache(folder: str | Path, *, num_parts: int = 2, **selection: Any) -> CacheWriter:
    """A whole, sealed cache."""
    writer = CacheWriter.open(folder, make_family_identity(num_parts=num_parts, **selection), FAMILIES)
    writer.put_head(make_output_head())
    for part in range(num_parts):
        writer.write_part(part, make_family_part(part))
    writer.seal()
    return writer
