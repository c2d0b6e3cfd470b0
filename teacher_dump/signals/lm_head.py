"""The teacher's output head: computes logits and relation matrices from final-norm hidden states.

The engine returns hidden states only; the head is read from the checkpoint and applied here, only to the requested
rows, in float32 and in chunks.

Legend: r rows, n visual rows of one image, v real vocabulary, d hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from storage.encoding.output_head import StoredHead, make_head
from storage.errors import StillhouseError
from storage.records.records import RelationMatrix
from teacher_dump.teachers import hf_checkpoint as checkpoint
from teacher_dump.teachers.device_failure import free_memory, is_out_of_memory

_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")  # of safetensors; any other needs a scale from another tensor
# Settings that change logits in ways that `_read_scale_and_cap` does not cover; models whose code does so are in
# teacher_dump/teachers/architectures.py. Source: `lm_head(` in transformers and `compute_logits` in vLLM.
_UNSUPPORTED_SETTINGS = ("dim_model_base", "output_multiplier", "logits_mup_width_multiplier", "norm_head")
# Their text_config may have a soft-cap, which the class with vision does not apply. Source: transformers' `lm_head(`.
_IGNORE_SOFT_CAP = ("paligemma", "gemma3")
# Rows of logits at once on a CPU: enough to keep it busy with a packed head, and small enough to stay in its caches
# for the selection.
_CPU_ROWS = 128
_VOCABULARY_CHUNK = 8192  # columns of [n, v] at once, where logits are not linear in the hidden states

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class ChunkSize:
    """The number of rows whose logits are in memory at once; halved once, permanently, where memory is short."""

    num_rows: int = 1024
    is_halved: bool = False

    def halve(self, tried: int) -> bool:
        """Halves the number of rows that were tried; returns False if that was done before, or if it is 1."""
        if self.is_halved or tried == 1:
            return False
        self.num_rows, self.is_halved = tried // 2, True
        return True


@dataclass(frozen=True, eq=False)
class OutputHead:
    """logits = soft_cap * tanh((hidden weight^T + bias) * scale / soft_cap); without a cap: (…) * scale."""

    weight: Float[Tensor, "v d"]  # float32, real vocabulary only
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    chunk_size: ChunkSize = field(default_factory=ChunkSize)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: Float[Tensor, "r d"]) -> Float[Tensor, "r v"]:
        """Computes raw float32 logits over the real vocabulary."""
        rows = hidden.to(self.weight.device, torch.float32)
        if self._packed_weight is None or not len(rows):
            product = rows @ self.weight.T
        else:
            product = torch.ops.mkldnn._linear_pointwise(rows, self._packed_weight, None, "none", [], "")
        return self._apply_bias_and_scale(product, slice(None))

    def _compute_columns(self, hidden: Tensor, columns: slice) -> Tensor:
        rows = hidden.to(self.weight.device, torch.float32)
        return self._apply_bias_and_scale(rows @ self.weight[columns].T, columns)

    def _apply_bias_and_scale(self, logits: Tensor, columns: slice) -> Tensor:
        """Applies bias, scale and soft-cap to the product of hidden states and weight."""
        if self.bias is not None:
            logits = logits + self.bias[columns]
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap

    def compute_label_logprobs(self, hidden: Float[Tensor, "r d"], labels: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
        """Returns each row's label logprob at temperature 1, float32."""
        labels = labels.to(self.weight.device)

        def take_labels(logits: Tensor, rows: slice) -> Tensor:
            return logits.gather(1, labels[rows, None])[:, 0] - logits.logsumexp(dim=1)

        return torch.cat(list(self.map_logits(hidden, take_labels)))

    def map_logits(self, hidden: Float[Tensor, "r d"], compute: Callable[[Tensor, slice], T]) -> Iterator[T]:
        """Yields `compute(logits, rows)` of consecutive rows, at most `chunk_size` at a time; once if there are none.

        If memory is short, the chunk size is halved once. Raises torch.OutOfMemoryError if half was too much.
        """
        start = 0
        while start < max(hidden.shape[0], 1):
            num = self.chunk_size.num_rows if self._packed_weight is None else min(self.chunk_size.num_rows, _CPU_ROWS)
            rows = slice(start, start + num)
            try:
                result = compute(self.logits(hidden[rows]), rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self.chunk_size.halve(num):
                    raise
                _log.warning("no memory for %d rows of logits; from now on half as many at once: %s", num, error)
            else:
                start += num
                yield result
                continue
            free_memory()  # here, where no traceback keeps the tensors of the failed attempt

    def relation(self, hidden: Float[Tensor, "n d"], *, centered: bool) -> RelationMatrix:
        """Computes G / ||G|| with G = Z Z^T, Z the raw logits of an image's visual rows; float32.

        `centered` subtracts the mean row of Z first. All zeros, with norm 0, if G is zero (a single
        centred row). Without bias and soft-cap G is H (W^T W) H^T, and Z is never computed.
        Source: LLaVA-KD (arXiv 2410.16236), L_rel.
        """
        rows = hidden.to(self.weight.device, torch.float32)
        if self.soft_cap is None and (self.bias is None or centered):
            rows = rows - rows.mean(dim=0) if centered else rows  # a bias is the same in every row
            gram = (rows @ self._weight_gram @ rows.T) * self.scale**2  # (n, n)
        else:
            gram = rows.new_zeros(rows.shape[0], rows.shape[0])
            for start in range(0, self.vocab_size, _VOCABULARY_CHUNK):
                logits = self._compute_columns(rows, slice(start, start + _VOCABULARY_CHUNK))
                logits = logits - logits.mean(dim=0) if centered else logits
                gram += logits @ logits.T
        gram = (gram + gram.T) / 2
        norm = float(torch.linalg.matrix_norm(gram.double()))
        if not np.isfinite(norm):
            raise ValueError("the relation matrix is not finite")
        values = gram / norm if norm > 0 else torch.zeros_like(gram)
        return RelationMatrix(values.cpu().numpy().astype(np.float32), norm)

    def stored(self) -> StoredHead:
        """Returns the head as a cache stores it."""
        bias = None if self.bias is None else self.bias.cpu().numpy()
        return make_head(self.weight.cpu().numpy(), bias, scale=self.scale, soft_cap=self.soft_cap)

    @cached_property
    def _packed_weight(self) -> Tensor | None:
        """The weight in oneDNN's layout, which a CPU multiplies twice as fast; None on other devices."""
        if self.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return None
        return torch.ops.mkldnn._reorder_linear_weight(self.weight, _CPU_ROWS)

    @cached_property
    def _weight_gram(self) -> Tensor:
        """W^T W, (d, d), computed once for each teacher."""
        return self.weight.T @ self.weight


@dataclass(frozen=True)
class HeadLocation:
    """The tensor names of a checkpoint's output head, and the scale and soft-cap of its logits."""

    weight: str  # names of tensors
    bias: str | None
    scale: float
    soft_cap: float | None


def find_head(folder: Path, *, vocab_size: int) -> HeadLocation:
    """Finds the output head of a checkpoint; reads weights only to compare a stored head that is called tied.

    A tied head is the input embedding. Raises StillhouseError for no head, a quantised head, a shape that does not
    fit the vocabulary or the hidden states, a tied head that differs from the embedding, or a model whose logits
    are computed in an unsupported way.
    """
    config = checkpoint.read_json(folder / "config.json")
    settings = checkpoint.get_text_settings(config)
    files = checkpoint.map_tensor_files(folder)
    _check_unpacked(folder, files, _HEAD)
    heads, embeddings = _find_by_suffix(files, _HEAD), _find_by_suffix(files, _EMBEDDING)
    flags = [part.get("tie_word_embeddings") for part in (config, settings)]
    found = heads or ([] if False in flags and True not in flags else embeddings)
    if len(found) != 1:
        raise StillhouseError(
            f"{folder}: expected one output head ({_HEAD}, or {_EMBEDDING} where they are tied), "
            f"found {', '.join(found) or 'none'}"
        )
    name = found[0]
    _check_unpacked(folder, files, name)
    num_rows = _count_matrix_rows(folder, files, name, hidden_size=settings.get("hidden_size"))
    if num_rows < vocab_size:
        raise StillhouseError(
            f"{folder}: the output head has {num_rows} rows, the tokenizer {vocab_size} tokens; "
            "some of its tokens can never be predicted: give it the tokenizer that it was trained with"
        )
    is_tied = bool(settings.get("tie_word_embeddings")) and len(embeddings) == 1
    if heads and is_tied and not _are_equal(files, name, embeddings[0]):
        raise StillhouseError(
            f"{folder}: config.json says tie_word_embeddings, but {name} and {embeddings[0]} differ; "
            "engines disagree about such a checkpoint: correct tie_word_embeddings or the weights"
        )
    bias = f"{name.removesuffix('weight')}bias" if heads else ""
    return HeadLocation(name, bias if bias in files else None, *_read_scale_and_cap(folder, config))


def read_head(folder: Path, *, vocab_size: int, device: str = "cpu", rows_per_chunk: int = 1024) -> OutputHead:
    """Reads the output head of a checkpoint, without rows beyond `vocab_size` (the tokenizer's real one).

    `rows_per_chunk`: rows of logits in memory at once. Raises StillhouseError: see find_head.
    """
    location = find_head(folder, vocab_size=vocab_size)
    files = checkpoint.map_tensor_files(folder)
    return OutputHead(
        weight=_read_rows(files, location.weight, vocab_size).to(device),
        bias=None if location.bias is None else _read_rows(files, location.bias, vocab_size).to(device),
        scale=location.scale,
        soft_cap=location.soft_cap,
        chunk_size=ChunkSize(rows_per_chunk),
    )


def _read_scale_and_cap(folder: Path, config: Mapping[str, Any]) -> tuple[float, float | None]:
    """Reads scale and soft-cap of the logits. Raises StillhouseError if a model changes them in another way."""
    settings = checkpoint.get_text_settings(config)
    kind = settings.get("model_type")
    strange = [name for name in _UNSUPPORTED_SETTINGS if settings.get(name)]
    if strange:
        raise StillhouseError(
            f"{folder}: {kind} computes its logits in a way that is not supported: its config.json has "
            f"{', '.join(strange)}"
        )
    scale = settings.get("logit_scale")  # Cohere; a string for some MPT
    if scale is None:
        scale = settings.get("lm_head_multiplier")  # Falcon-H1
    if scale is None:
        divisor = settings.get("logits_scaling") or 1.0  # Granite
        scale = divisor if kind == "hyperclovax" else 1.0 / divisor  # HyperCLOVA X multiplies by logits_scaling
    soft_cap = settings.get("final_logit_softcapping", settings.get("logits_soft_cap"))  # Gemma; RecurrentGemma
    if config.get("model_type") in _IGNORE_SOFT_CAP:
        soft_cap = None
    for value in (scale, 1.0 if soft_cap is None else soft_cap):
        if isinstance(value, bool) or not isinstance(value, int | float) or value == 0:
            raise StillhouseError(f"{folder}: config.json: a logit scale or soft-cap is {value!r}, expected a number")
    return float(scale), None if soft_cap is None else float(soft_cap)


def _check_unpacked(folder: Path, files: Mapping[str, Path], weight: str) -> None:
    """Raises StillhouseError if the weight has scales, zero points or a `qweight`: it is quantised."""
    stem = weight.removesuffix("weight")
    plain = (weight, f"{stem}bias")
    beside = [name for name in files if (name.startswith(stem) or f".{stem}" in name) and not name.endswith(plain)]
    if beside:
        raise StillhouseError(
            f"{folder}: the output head has {', '.join(sorted(beside))}, expected nothing but weight and bias; "
            "a quantised or adapted head is not read: quantise the teacher with its head left out "
            "(modules_to_not_convert or ignore: [lm_head]), or merge its adapter"
        )


def _count_matrix_rows(folder: Path, files: Mapping[str, Path], name: str, *, hidden_size: Any) -> int:
    """Returns the rows of a float matrix as wide as the hidden states. Raises StillhouseError for any other tensor."""
    header = checkpoint.read_header(files[name])[name]
    if header["dtype"] not in _PLAIN_DTYPES:
        raise StillhouseError(
            f"{folder}: {name} is stored as {header['dtype']}, expected one of {', '.join(_PLAIN_DTYPES)}; "
            "its scale is not read: dump the checkpoint whose output head is not quantised"
        )
    shape = header["shape"]
    if len(shape) != 2 or (isinstance(hidden_size, int) and shape[1] != hidden_size):
        raise StillhouseError(
            f"{folder}: {name} has the shape {shape}, expected [vocabulary, {hidden_size or 'hidden_size'}] "
            "(hidden_size of config.json)"
        )
    return shape[0]


def _find_by_suffix(files: Mapping[str, Path], suffix: str) -> list[str]:
    return [name for name in files if name == suffix or name.endswith(f".{suffix}")]


def _read_rows(files: Mapping[str, Path], name: str, num_rows: int) -> Tensor:
    with safe_open(files[name], framework="pt") as tensors:
        return tensors.get_slice(name)[:num_rows].to(torch.float32).contiguous()


def _are_equal(files: Mapping[str, Path], one: str, other: str) -> bool:
    """Returns whether two matrices of a checkpoint are equal, comparing a block of rows at a time."""
    with safe_open(files[one], framework="pt") as ours, safe_open(files[other], framework="pt") as theirs:
        left, right = ours.get_slice(one), theirs.get_slice(other)
        if left.get_shape() != right.get_shape():
            return False
        starts = range(0, left.get_shape()[0], _VOCABULARY_CHUNK)
        return all(torch.equal(*(part[at : at + _VOCABULARY_CHUNK] for part in (left, right))) for at in starts)
