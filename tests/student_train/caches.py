"""Small sealed caches for the student's tests, written with storage alone, without a teacher.

Teacher rows come from random logits; `sparse_rows` selects entries by top k or threshold sampling, in plain numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage.encoding.output_head import make_head
from storage.identity import Identity, compute_tokenizer_fingerprint
from storage.images.settings import PixelSettings
from storage.records.records import (
    ImageRef,
    PartRecords,
    RelationMatrix,
    SampleRecord,
    SequenceLogprob,
    TokensRecord,
    compute_image_key,
)
from storage.records.sample_batch import SampleBatch
from storage.records.sample_key import HALVES, SampleKey
from storage.records.sparse_rows import SparseRows
from storage.writer.cache_writer import CacheWriter

QUESTIONS = ("what colour is the left half?", "what colour is the right half?", "describe the image.")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def join_records(records: Sequence[SampleRecord]) -> SampleBatch:
    """Join records, which a test may have changed, to a batch; a family that one of them lacks is None."""
    images = [(record, image.key) for record in records for image in record.tokens.images]
    visual = [record.visual.get(key) for record, key in images]
    relation = [record.relation.get(key) for record, key in images]
    response = [record.response for record in records if record.response is not None]
    hidden = [record.hidden for record in records if record.hidden is not None]
    sequence = [record.sequence.logprob for record in records if record.sequence is not None]
    return replace(
        SampleBatch.of_tokens([record.tokens for record in records]),
        response=SparseRows.concatenate(response) if len(response) == len(records) else None,
        visual=None if None in visual else SparseRows.concatenate([rows for rows in visual if rows is not None]),
        relation=None if None in relation else relation,
        hidden=np.concatenate(hidden) if len(hidden) == len(records) else None,
        sequence=np.array(sequence, np.float32) if len(sequence) == len(records) else None,
    )


def log_softmax(logits: NDArray) -> NDArray[np.float64]:
    """Compute log-softmax of each row, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def sparse_rows(
    logits: NDArray,
    *,
    k: int | None = None,
    tau: float | None = None,
    seed: int = 0,
    labels: NDArray | None = None,
    temperatures: Sequence[float] = (),
) -> SparseRows:
    """Convert logits (r, v) to rows as a cache stores them: the k most probable, or threshold sampling with tau."""
    logprobs = log_softmax(logits)
    draw = np.random.default_rng(seed)
    ids, values, offsets, num_exact, tails = [], [], [0], [], []
    for row in logprobs:
        order = np.argsort(-row, kind="stable")
        count = k if k is not None else int((np.exp(row) >= tau).sum())
        exact = order[:count]
        row_ids, row_values = [exact], [row[exact]]
        if tau is not None:
            rest = np.sort(order[count:])
            points = np.cumsum(np.exp(row[rest])) / tau + draw.random()
            drawn = (
                np.diff(np.floor(np.concatenate([[points[0] - np.exp(row[rest[0]]) / tau], points])))
                if len(rest)
                else []
            )
            taken = np.flatnonzero(drawn)
            row_ids.append(rest[taken])
            row_values.append(np.log(np.asarray(drawn)[taken] * tau))
        ids.append(np.concatenate(row_ids))
        values.append(np.concatenate(row_values))
        offsets.append(offsets[-1] + len(ids[-1]))
        num_exact.append(count)
        tails.append(max(0.0, 1.0 - np.exp(row[exact]).sum()))
    probabilities = np.exp(logprobs)
    return SparseRows(
        offsets=np.array(offsets, np.int64),
        ids=np.concatenate([*ids, []]).astype(np.int32),
        logprobs=np.concatenate([*values, []]).astype(np.float32),
        num_exact=np.array(num_exact, np.int32),
        tail_mass=np.array(tails, np.float32),
        entropy=-(probabilities * logprobs).sum(-1).astype(np.float32),
        log_sum_exp=np.array(
            [np.log(np.exp(logprobs / temperature).sum(-1)) for temperature in temperatures], np.float32
        )
        .reshape(len(temperatures), len(logits))
        .T.copy(),
        label_logprob=None if labels is None else logprobs[np.arange(len(labels)), labels].astype(np.float32),
    )


def make_cache(
    folder: Path,
    checkpoint: Path,
    *,
    num_samples: int = 24,
    num_images: int = 8,
    families: Sequence[str] = ("response", "visual", "relation"),
    splits: Sequence[str] = ("train", "test"),
    image_size: int = 32,
    tokens_per_image: int = 16,
    images_per_sample: int = 1,
    k: int | None = 8,
    tau: float | None = None,
    seed: int = 0,
    temperatures: Sequence[float] = (),
    **identity_fields: Any,
) -> Path:
    """Write a cache that a student with `checkpoint`'s tokenizer can learn; images lie in <folder>/images.

    `num_samples` for each split. Sample i shows image i % num_images and asks for one of its colours. With the
    family sequence, samples 2 i and 2 i + 1 are the right and a wrong answer to one question.
    """
    from student_train.models.huggingface import load_config, load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    vocabulary = tokenizer.get_vocab()
    vocab_size = max(vocabulary.values()) + 1
    draw = np.random.default_rng(seed)
    method: dict[str, Any] = {"method": "topk", "k": k} if tau is None else {"method": "threshold", "tau": tau}
    method |= {"temperatures": list(temperatures)} if temperatures else {}
    k = None if tau is not None else k
    identity = Identity(
        **{
            "teacher": "random",
            "teacher_fingerprint": "none",
            "dtype": "float32",
            "engine": "numpy",
            "tokenizer_fingerprint": compute_tokenizer_fingerprint(vocabulary),
            "vocab_size": vocab_size,
            "chat_template_fingerprint": "test",
            "image_preprocessing_fingerprint": "test",
            "pixels": PixelSettings(),
            "image_token_id": load_config(checkpoint).image_token_id,
            "eos_token_ids": (tokenizer.eos_token_id,),
            "plan_fingerprint": "test",
            "num_parts": len(splits),
            "image_root": str(folder / "images"),
            "selection": {"response": method, "visual": method, "relation": {"centered": False}},
            **identity_fields,
        }
    )
    writer = CacheWriter.open(folder / "cache", identity, families)
    if "hidden" in families:
        writer.put_head(make_head(draw.normal(size=(vocab_size, 12)).astype(np.float32)))
    for part, split in enumerate(splits):
        pictures = [_picture(folder / "images", f"{split}-{n}.png", image_size, draw) for n in range(num_images)]
        records = []
        for index in range(num_samples):
            number, half = divmod(index, 2) if "sequence" in families else (index, 0)
            key = SampleKey(f"{split}-{number:03d}", HALVES[half] if "sequence" in families else None)
            shown = [pictures[(number + n) % num_images] for n in range(images_per_sample)]
            records.append(_sample(tokenizer, identity, key, split, number, shown, tokens_per_image, wrong=bool(half)))
        keys = {image.key: image for record in records for image in record.images}
        responses = [record.token_ids[record.response_mask] for record in records]
        writer.write_part(
            part,
            PartRecords(
                tokens=records,
                response=[
                    sparse_rows(
                        _logits(draw, len(ids), vocab_size, ids), k=k, tau=tau, labels=ids, temperatures=temperatures
                    )
                    for ids in responses
                ]
                if "response" in families
                else None,
                visual={
                    key: sparse_rows(
                        _logits(draw, image.num_visual_tokens, vocab_size), k=k, tau=tau, temperatures=temperatures
                    )
                    for key, image in keys.items()
                }
                if "visual" in families
                else None,
                relation={key: _relation(draw, image.num_visual_tokens) for key, image in keys.items()}
                if "relation" in families
                else None,
                hidden=[draw.normal(size=(len(ids), 12)).astype(np.float32) for ids in responses]
                if "hidden" in families
                else None,
                images={name: content for record in records for name, content in _files(folder / "images", record)}
                if "images" in families
                else None,
                sequence=[
                    SequenceLogprob(float(np.float32(draw.uniform(-30, -10))), record.num_response_tokens)
                    for record in records
                ]
                if "sequence" in families
                else None,
            ),
        )
    writer.seal()
    return folder / "cache"


def _picture(root: Path, name: str, size: int, draw: np.random.Generator) -> tuple[str, str, str, str]:
    left, right = (str(draw.choice(list(COLOURS))) for _ in range(2))
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:, : size // 2], pixels[:, size // 2 :] = COLOURS[left], COLOURS[right]
    pixels[0] = draw.integers(0, 255, (size, 3))
    root.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / name)
    return name, hashlib.sha256((root / name).read_bytes()).hexdigest(), left, right


def _sample(
    tokenizer: Any,
    identity: Identity,
    key: SampleKey,
    split: str,
    index: int,
    shown: list,
    tokens_per_image: int,
    *,
    wrong: bool = False,
) -> TokensRecord:
    _, _, left, right = shown[0]
    if wrong:
        left, right = (next(colour for colour in COLOURS if colour != right_one) for right_one in (left, right))
    kind = index % len(QUESTIONS)
    answer = (left, right, f"the left half is {left} and the right half is {right}")[kind]
    prompt = "<|im_start|>user\n" + "<image>\n" * len(shown) + QUESTIONS[kind] + "<|im_end|>\n<|im_start|>assistant\n"
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    token_ids = np.array([*before, *response, *tokenizer("\n")["input_ids"]], np.int32)
    mask = np.zeros(len(token_ids), bool)
    mask[len(before) : len(before) + len(response)] = True
    places = np.flatnonzero(token_ids == identity.image_token_id)
    hashes = [sha256 for _, sha256, _, _ in shown]
    images = tuple(
        ImageRef(name, sha256, tokens_per_image, compute_image_key(token_ids[: place + 1], hashes[: n + 1], "test"))
        for n, ((name, sha256, _, _), place) in enumerate(zip(shown, places, strict=True))
    )
    return TokensRecord(key, split, ("left", "right", "caption")[kind], token_ids, mask, images)


def _files(root: Path, record: TokensRecord) -> list[tuple[str, bytes]]:
    return [(image.sha256, image.file(root).read_bytes()) for image in record.images]


def _logits(draw: np.random.Generator, rows: int, vocab_size: int, favoured: NDArray | None = None) -> NDArray:
    logits = draw.normal(0, 1.5, (rows, vocab_size))
    if favoured is not None:
        logits[np.arange(rows), favoured] += 6
    return logits


def _relation(draw: np.random.Generator, size: int) -> RelationMatrix:
    factor = draw.normal(size=(size, 8))
    gram = factor @ factor.T
    norm = float(np.linalg.norm(gram))
    return RelationMatrix((gram / norm).astype(np.float32), norm)
