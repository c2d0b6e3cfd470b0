"""The constants of a forecast from published sizes, each with its source. `plan` prints them beside its figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from storage.config import RelationSection, SelectionSection

# Tokens of a sample. Assumed: those of the project's own step benchmark, and the length of a caption of one sentence.
QUESTION_TOKENS = 64
RESPONSE_TOKENS = 150
CAPTION_TOKENS = 20
# Share of the peak. Assumed: nothing was measured on the GPUs that are named.
SCORING_UTILISATION = 0.30
TRAINING_UTILISATION = 0.30
# FLOPs of a parameter and token: 2 forward; 2 for gradients of activations; 2 for those of weights; 2 to compute
# activations again with gradient checkpointing. (Attention over positions is left out.)
FORWARD, ACTIVATIONS, WEIGHTS, AGAIN = 2, 2, 2, 2
# Active and total over dense parameters of a student of 4 experts, top 2. Source: LLaVA-MoD, of Qwen1.5-1.8B
MOE_FACTOR, MOE_TOTAL_FACTOR = 2.2 / 1.8, 3.0 / 1.8
# Bytes. Source: docs/storing.md, SmolLM2-135M's rows (V = 49,152), `python -m benchmarks.codec`.
_THRESHOLD_BYTES = ((0.004, 76.0), (0.01, 46.0), (0.02, 31.5), (0.04, 22.6))
_TOPK_BYTES = ((50, 78.8), (128, 184.7))
_MASS_BYTES = 155.5  # of mass 0.9
_DRAW_BYTES = 28.6 / 50  # of one draw
_LOW_RANK_BYTES = 29_008 / 576  # of a visual token, at a cosine error of 1e-3: the largest of five kinds
SAMPLE_BYTES = 100  # of a record of tokens without its ids. Computed: spans, hashes, key
ID_BYTES = 4  # of a token id, uncompressed: an upper bound
PAIR_BYTES = 8  # two float32
WEIGHT_BYTES = 2  # bf16


@dataclass(frozen=True)
class SampleLengths:
    """Assumed tokens of a sample."""

    question: int = QUESTION_TOKENS
    response: int = RESPONSE_TOKENS
    caption: int = CAPTION_TOKENS


def estimate_row_bytes(section: SelectionSection) -> float:
    """Bytes of a stored row of natural text; between measured settings on a line through their logarithms."""
    if section.method == "threshold":
        return _interpolate(_THRESHOLD_BYTES, section.tau) * section.draw_sets
    if section.method == "topk":
        return _interpolate(_TOPK_BYTES, section.k)
    return _MASS_BYTES if section.method == "mass" else _DRAW_BYTES * section.draws


def estimate_relation_bytes(section: RelationSection, num_visual_tokens: int) -> float:
    """Bytes of an image's relation matrix."""
    triangle = num_visual_tokens * (num_visual_tokens + 1) / 2
    if section.encoding == "low_rank":
        return min(_LOW_RANK_BYTES * num_visual_tokens, 2 * triangle)
    if section.encoding == "pooled":
        return 2 * triangle / (section.pool or 2) ** 4
    return triangle * (1 if section.encoding == "triangle_int8" else 2)


def _interpolate(points: tuple[tuple[float, float], ...], at: float) -> float:
    """A power law through the two nearest of the measured points."""
    pairs = list(pairwise(points))
    (left, low), (right, high) = next((pair for pair in pairs if at <= pair[1][0]), pairs[-1])
    slope = math.log(high / low) / math.log(right / left)
    return low * (at / left) ** slope
