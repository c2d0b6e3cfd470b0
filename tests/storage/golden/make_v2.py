"""The golden cache of format version 2: what it holds besides version 1's contents, and the script that wrote v2/.

Two segments: tokens, response, visual and relation; then hidden and sequence, added. The folder v2/ was written by
the last code of format version 2 and is never written again: every later reader must give these numbers.
`python -m tests.storage.golden.make_v2 FOLDER` needs that code.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.storage.golden.make_v1 import IDENTITY as IDENTITY_1
from tests.storage.golden.make_v1 import IMAGES, PARTS, PREPROCESSING, SIGNALS, TAU

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
IDENTITY: dict[str, Any] = {**IDENTITY_1, "selection": SELECTION}
HEAD = [[1.0, 0.0], [0.5, -2.0]]  # weight of its first two tokens; all others are 0


def hidden_state(row: int) -> list[float]:
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
        image_key,
    )
    from storage.records.sparse_rows import SparseRows
    from storage.writer.cache_writer import CacheWriter

    def rows(contents: list[dict[str, Any]], *, labels: bool, temperatures: int = 0) -> SparseRows:
        ids = [number for row in contents for number in (*row["exact"], *row["sampled"])]
        weights = [
            p for row in contents for p in (*row["exact"].values(), *(TAU * draws for draws in row["sampled"].values()))
        ]
        sizes = [len(row["exact"]) + len(row["sampled"]) for row in contents]

        def scalars(name: str) -> np.ndarray:
            return np.array([row[name] for row in contents], np.float32)

        return SparseRows(
            offsets=np.cumsum([0, *sizes]).astype(np.int64),
            ids=np.array(ids, np.int32),
            logprobs=np.log(np.array(weights)).astype(np.float32),
            num_exact=np.array([len(row["exact"]) for row in contents], np.int32),
            tail_mass=scalars("tail_mass"),
            entropy=scalars("entropy"),
            log_sum_exp=np.repeat(scalars("log_sum_exp")[:, None], temperatures, axis=1),
            label_logprob=scalars("label_logprob") if labels else None,
        )

    def tokens(sample: dict[str, Any]) -> TokensRecord:
        refs = []
        for name in sample["images"]:
            sha256 = IMAGES[name]["sha256"]
            key = image_key(sample["token_ids"][:2], [sha256], PREPROCESSING)
            refs.append(ImageRef(f"set/{name}", sha256, IMAGES[name]["num_visual_tokens"], key))
        return TokensRecord(
            sample["sample_id"], sample["split"], sample["category"],
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
                response=[rows(sample["response"], labels=True, temperatures=1) for sample in part["samples"]],
                visual={key: rows(signals["visual"], labels=False) for key, signals in keys.items()},
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
                    np.array([hidden_state(row) for row in range(count)], np.float32).reshape(-1, 2) for count in counts
                ],
                sequence=[SequenceLogprob(SEQUENCE_LOGPROB * count, count) for count in counts],
            ),
        )
    more.seal()


if __name__ == "__main__":
    main(sys.argv[1])
