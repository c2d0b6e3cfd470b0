"""The golden cache: its contents as plain numbers, and the script that wrote the folder cache/.

Two segments: tokens, response, visual and relation; then hidden and sequence, added. A commit that changes the format
renews the folder, and says so: remove it, and run `python -m tests.storage.golden.make_cache FOLDER`.
"""

from __future__ import annotations

import sys
from typing import Any

TAU = 0.125  # of the threshold rows (responses); visual rows are the top 3
PREPROCESSING = "4" * 64
TEMPERATURE = 2.0
ROUNDING_KL = 5e-4  # nats a row
SEQUENCE_LOGPROB = -0.75  # of every answer token
SELECTION: dict[str, dict[str, Any]] = {
    "response": {
        "method": "threshold",
        "tau": TAU,
        "seed": 0,
        "temperatures": [TEMPERATURE],
        "rounding_kl": ROUNDING_KL,
    },
    "visual": {"method": "topk", "k": 3, "temperatures": [], "rounding_kl": ROUNDING_KL},
    "relation": {"centered": False, "encoding": "low_rank", "max_cosine_error": 0.01, "factor_dtype": "float16"},
}
ADDED: dict[str, dict[str, Any]] = {"hidden": {"encoding": "int8"}}
IDENTITY: dict[str, Any] = {
    "teacher": "golden/teacher@main",
    "teacher_fingerprint": "1" * 64,
    "dtype": "bfloat16",
    "engine": "none 1.0",
    "tokenizer_fingerprint": "2" * 64,
    "vocab_size": 1000,
    "chat_template_fingerprint": "3" * 64,
    "image_preprocessing_fingerprint": PREPROCESSING,
    "image_token_id": 999,
    "eos_token_ids": (2,),
    "plan_fingerprint": "5" * 64,
    "num_parts": 2,
    "image_root": "/data/images",
    "selection": SELECTION,
}


def _make_row(exact, sampled, tail_mass, entropy, log_sum_exp, label_logprob=None) -> dict[str, Any]:
    """One row: exact entries {id: p}, sampled entries {id: draws}, and the scalars."""
    row = {"exact": exact, "sampled": sampled, "tail_mass": tail_mass, "entropy": entropy, "log_sum_exp": log_sum_exp}
    return row if label_logprob is None else {**row, "label_logprob": label_logprob}


IMAGES: dict[str, dict[str, Any]] = {  # by file name
    "red.png": {"sha256": "a" * 64, "num_visual_tokens": 2},
    "blue.png": {"sha256": "b" * 64, "num_visual_tokens": 3},
}
SIGNALS: dict[str, dict[str, Any]] = {  # of an image that stands alone after token 1
    "red.png": {
        "visual": [
            _make_row({5: 0.5, 6: 0.25, 7: 0.125}, {}, 0.125, 1.25, 10.0),
            _make_row({900: 0.75, 3: 0.125, 4: 0.0625}, {}, 0.0625, 0.75, -3.5),
        ],
        "relation": [[0.75, 0.25], [0.25, 0.5590169943749475]],
        "norm": 12.5,
    },
    "blue.png": {
        "visual": [
            _make_row({number: 0.5, number + 1: 0.25, 0: 0.25}, {}, 0.0, 1.0397, 2.0) for number in (10, 20, 30)
        ],
        "relation": [[0.5, 0.25, 0.125], [0.25, 0.5, 0.25], [0.125, 0.25, 0.46770717334674267]],
        "norm": 1000.0,
    },
}
PARTS: list[dict[str, Any]] = [
    {
        "samples": [
            {
                "sample_id": "first",
                "split": "train",
                "category": "colour",
                "token_ids": [1, 999, 20, 21, 30, 31],
                "response_mask": [0, 0, 0, 0, 1, 1],
                "images": ["red.png"],
                "response": [
                    _make_row({7: 0.5, 3: 0.25}, {12: 1, 500: 1}, 0.25, 1.5, 4.25, -1.3862944),
                    _make_row({31: 1.0}, {}, 0.0, 0.0, 20.0, 0.0),
                ],
            },
            {
                "sample_id": "second, of the same image",
                "split": "test",
                "category": "größe",
                "token_ids": [1, 999, 22, 40, 23, 41],
                "response_mask": [0, 0, 0, 1, 0, 1],
                "images": ["red.png"],
                "response": [
                    _make_row({40: 0.375, 2: 0.125}, {0: 2, 41: 1, 998: 1}, 0.5, 3.0, 1.5, -0.98082925),
                    _make_row({41: 0.875}, {9: 1}, 0.125, 0.5, 7.0, -0.13353139),
                ],
            },
            {
                "sample_id": "third, without an answer",
                "split": "train",
                "category": "",
                "token_ids": [1, 24, 25],
                "response_mask": [0, 0, 0],
                "images": [],
                "response": [],
            },
        ],
        "errors": [("broken", "image gone.png: is missing")],
    },
    {
        "samples": [
            {
                "sample_id": "fourth",
                "source": 1,
                "split": "train",
                "category": "colour",
                "token_ids": [1, 999, 26, 50],
                "response_mask": [0, 0, 0, 1],
                "images": ["blue.png"],
                "response": [_make_row({50: 0.625, 51: 0.125}, {70: 2}, 0.25, 1.0, 3.0, -0.47000363)],
            },
        ],
        "errors": [],
    },
]
HEAD = [[1.0, 0.0], [0.5, -2.0]]  # weight of its first two tokens; all others are 0


def make_hidden_state(row: int) -> list[float]:
    """The state behind an answer's row."""
    return [0.5 * row, -1.0]


def main(folder: str) -> None:
    import numpy as np

    from storage.encoding.output_head import make_head
    from storage.identity import Identity
    from storage.records.records import (
        ImageRef,
        PartRecords,
        RelationMatrix,
        SampleError,
        SequenceLogprob,
        TokensRecord,
        compute_image_key,
    )
    from storage.records.sample_key import SampleKey
    from storage.records.sparse_rows import SparseRows
    from storage.writer.cache_writer import CacheWriter

    def make_rows(contents: list[dict[str, Any]], *, labels: bool, temperatures: int = 0) -> SparseRows:
        ids = [number for row in contents for number in (*row["exact"], *row["sampled"])]
        weights = [
            p for row in contents for p in (*row["exact"].values(), *(TAU * draws for draws in row["sampled"].values()))
        ]
        sizes = [len(row["exact"]) + len(row["sampled"]) for row in contents]

        def make_scalars(name: str) -> np.ndarray:
            return np.array([row[name] for row in contents], np.float32)

        return SparseRows(
            offsets=np.cumsum([0, *sizes]).astype(np.int64),
            ids=np.array(ids, np.int32),
            logprobs=np.log(np.array(weights)).astype(np.float32),
            num_exact=np.array([len(row["exact"]) for row in contents], np.int32),
            tail_mass=make_scalars("tail_mass"),
            entropy=make_scalars("entropy"),
            log_sum_exp=np.repeat(make_scalars("log_sum_exp")[:, None], temperatures, axis=1),
            label_logprob=make_scalars("label_logprob") if labels else None,
        )

    def tokens(sample: dict[str, Any]) -> TokensRecord:
        refs = []
        for name in sample["images"]:
            sha256 = IMAGES[name]["sha256"]
            key = compute_image_key(sample["token_ids"][:2], [sha256], PREPROCESSING)
            refs.append(ImageRef(f"set/{name}", sha256, IMAGES[name]["num_visual_tokens"], key))
        return TokensRecord(
            SampleKey(sample["sample_id"], source=sample.get("source", 0)), sample["split"], sample["category"],
            np.array(sample["token_ids"], np.int32), np.array(sample["response_mask"], bool), tuple(refs),
        )  # fmt: skip

    writer = CacheWriter.open(folder, Identity(**IDENTITY), ("response", "visual", "relation"))
    for number, part in enumerate(PARTS):
        records = [tokens(sample) for sample in part["samples"]]
        keys = {
            ref.key: SIGNALS[name]
            for record, sample in zip(records, part["samples"], strict=True)
            for ref, name in zip(record.images, sample["images"], strict=True)
        }
        writer.write_part(
            number,
            PartRecords(
                tokens=records,
                response=[make_rows(sample["response"], labels=True, temperatures=1) for sample in part["samples"]],
                visual={key: make_rows(signals["visual"], labels=False) for key, signals in keys.items()},
                relation={
                    key: RelationMatrix(np.array(signals["relation"], np.float32), signals["norm"])
                    for key, signals in keys.items()
                },
                errors=[SampleError(*error) for error in part["errors"]],
            ),
        )
    writer.seal()
    more = CacheWriter.open(folder, Identity(**{**IDENTITY, "selection": ADDED}), ("hidden", "sequence"))
    weight = np.zeros((IDENTITY["vocab_size"], 2), np.float32)
    weight[:2] = HEAD
    more.put_head(make_head(weight, None, scale=0.25, soft_cap=None))
    for number, part in enumerate(PARTS):
        records = [tokens(sample) for sample in part["samples"]]
        counts = [record.num_response_tokens for record in records]
        more.write_part(
            number,
            PartRecords(
                tokens=records,
                hidden=[
                    np.array([make_hidden_state(row) for row in range(count)], np.float32).reshape(-1, 2)
                    for count in counts
                ],
                sequence=[SequenceLogprob(SEQUENCE_LOGPROB * count, count) for count in counts],
            ),
        )
    more.seal()


if __name__ == "__main__":
    main(sys.argv[1])
