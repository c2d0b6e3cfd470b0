"""The payload of a relation matrix: a triangle, a low-rank factor or a pooled grid. FORMAT.md specifies the bytes.

Each payload contains its encoding's cosine error. A decoder knows the image's number of visual tokens, and
checks that the payload has the length that its header implies before it allocates memory. All numbers are
little-endian.

Legend: n visual tokens, k rank of a factor, m blocks of a pooled grid.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.config import RelationSection
from storage.errors import CorruptPartError
from storage.records.records import PooledRelation, Relation, RelationFactor, RelationMatrix

PAYLOAD_VERSION = 2
MAX_RELATION_ROWS = 65535
NORM_TOLERANCE = 1e-3  # how far a matrix's Frobenius norm may lie from 1 before it is refused at writing
DECODED_NORM_TOLERANCE = 0.02  # the same at reading: float16 moves the norm a little
NOTHING_LEFT = 1e-6  # norm of a pooled G / ||G|| that is float32 rounding: centred rows that cancel out

_HEADER = struct.Struct("<BBBxIIf")  # version, kind, pool, n, k, cosine error
_TRIANGLE_FP16, _TRIANGLE_INT8, _FACTOR_FP16, _FACTOR_INT8, _POOLED_FP16 = range(5)
_KINDS = (RelationMatrix, RelationMatrix, RelationFactor, RelationFactor, PooledRelation)


def encode_relation(matrix: RelationMatrix, section: RelationSection) -> bytes:
    """Encodes a matrix in the section's encoding. ValueError for an invalid matrix.

    The payload does not contain the norm: see compute_stored_norm. An int8 factor that is not smaller than
    the float16 factor is replaced by that, and a factor that is not smaller than the float16 triangle by that.
    """
    check_relation(matrix)
    if section.encoding == "triangle_int8":
        return _encode_triangle_int8(matrix)
    if section.encoding == "low_rank":
        assert section.max_cosine_error is not None
        return _encode_low_rank(matrix, section.max_cosine_error, int8=section.factor_dtype == "int8")
    if section.encoding == "pooled":
        assert section.pool is not None
        return _encode_pooled(matrix, section.pool)
    return _encode_triangle(matrix)


def compute_stored_norm(matrix: RelationMatrix, section: RelationSection) -> float:
    """Returns the Frobenius norm of the stored matrix: of G itself, or of the pooled G."""
    if section.encoding != "pooled" or matrix.norm == 0:
        return matrix.norm
    assert section.pool is not None
    pooled_norm = float(np.linalg.norm(_pool_matrix(matrix.values, section.pool)))
    return matrix.norm * pooled_norm if pooled_norm > NOTHING_LEFT else 0.0


def decode_relation(payload: bytes | memoryview, *, norm: float, num_visual_tokens: int) -> Relation:
    """Decodes a payload into a matrix, a factor or a pooled matrix, rescaled to Frobenius norm 1.

    Errors: CorruptPartError unless it is a valid payload of an image with `num_visual_tokens`.
    """
    kind, pool, n, values, frobenius = _read_values(payload, norm, num_visual_tokens)
    if kind in (_FACTOR_FP16, _FACTOR_INT8):
        return RelationFactor((values / math.sqrt(frobenius)).astype(np.float32), float(norm))
    values /= np.float32(frobenius)
    matrix = _mirror_triangle(values, count_grid_blocks(n, pool) if pool else n)
    if kind == _POOLED_FP16:
        return PooledRelation(matrix, float(norm), num_visual_tokens=n, pool=pool)
    return RelationMatrix(matrix, float(norm))


def check_payload(
    payload: bytes | memoryview, *, norm: float, num_visual_tokens: int, section: RelationSection
) -> None:
    """Does the checks of `decode_relation` and `check_encoding` without building the matrix.

    Errors: CorruptPartError.
    """
    kind, pool, *_ = _read_values(payload, norm, num_visual_tokens)
    _check_kind(_KINDS[kind], pool or None, section)


def _read_values(
    payload: bytes | memoryview, norm: float, num_visual_tokens: int
) -> tuple[int, int, int, NDArray[Any], float]:
    """Returns kind, pool, n, the factor or packed triangle, and the Frobenius norm to divide it by."""
    view = memoryview(payload).cast("B")
    kind, pool, n, k, _ = _read_header(view)
    if n != num_visual_tokens:
        raise CorruptPartError(f"relation payload has n = {n} for {num_visual_tokens} visual tokens")
    if not np.isfinite(norm) or norm < 0:
        raise CorruptPartError(f"the norm of a relation matrix is {norm}, not a finite number of at least 0")
    content = view[_HEADER.size :]
    if kind in (_FACTOR_FP16, _FACTOR_INT8):
        values = _read_factor(content, n, k, int8=kind == _FACTOR_INT8)
        frobenius = float(np.linalg.norm(values.T @ values))
    else:
        size = count_grid_blocks(n, pool) if kind == _POOLED_FP16 else n
        values = _read_int8(content, n) if kind == _TRIANGLE_INT8 else _read_fp16(content)
        size = count_grid_blocks(n, pool) if kind == _POOLED_FP16 else n
        wide = values.astype(np.float64)
        diagonal = wide[_diagonal_indices(size)]  # all other values occur twice in the matrix
        frobenius = math.sqrt(2 * float(wide @ wide) - float(diagonal @ diagonal))
    return kind, pool, n, values, _check_norm(frobenius, norm)


def read_cosine_error(payload: bytes | memoryview) -> float:
    """Returns the encoding error of a payload: 1 - cosine to the original, as measured by the writer."""
    return _read_header(memoryview(payload).cast("B"))[4]


def check_encoding(relation: Relation, section: RelationSection) -> None:
    """Raises CorruptPartError unless a cache with this encoding may store such a matrix."""
    _check_kind(type(relation), relation.pool if isinstance(relation, PooledRelation) else None, section)


def _check_kind(kind: type[Relation], pool: int | None, section: RelationSection) -> None:
    expected = {"low_rank": (RelationFactor, RelationMatrix), "pooled": (PooledRelation,)}
    if kind not in expected.get(section.encoding, (RelationMatrix,)) or pool != section.pool:
        got = f"{kind.__name__}{'' if pool is None else f' of pool {pool}'}"
        raise CorruptPartError(f"relation payload is a {got}, the cache's encoding is {section.encoding!r}")


def assign_grid_blocks(num_visual_tokens: int, pool: int) -> NDArray[np.int64]:
    """Returns (n,) the block of each visual token when a square grid is cut into pool x pool blocks.

    Tokens and blocks are numbered row by row. If `pool` does not divide the grid's side, the last blocks of
    a row or column are smaller. Errors: ValueError for a number of tokens that is not a square.
    """
    side = math.isqrt(num_visual_tokens)
    if side * side != num_visual_tokens or side == 0:
        raise ValueError(f"{num_visual_tokens} visual tokens are no square grid, which encoding 'pooled' needs")
    line = np.arange(side) // pool
    return (line[:, None] * math.ceil(side / pool) + line).ravel()


def count_grid_blocks(num_visual_tokens: int, pool: int) -> int:
    """Returns m, the number of blocks of a square grid. Errors as assign_grid_blocks."""
    side = math.isqrt(num_visual_tokens)
    if side * side != num_visual_tokens or side == 0:
        raise ValueError(f"{num_visual_tokens} visual tokens are no square grid, which encoding 'pooled' needs")
    return math.ceil(side / pool) ** 2


def check_relation(matrix: RelationMatrix) -> None:
    """Raises ValueError unless this is G / ||G|| of a symmetric G, with a valid norm of G."""
    values, n = matrix.values, len(matrix.values)
    if values.shape != (n, n) or values.dtype != np.float32 or not 1 <= n <= MAX_RELATION_ROWS:
        raise ValueError(f"a relation matrix must be float32 and square, got {values.dtype}{values.shape}")
    if not np.isfinite(values).all() or not np.allclose(values, values.T, rtol=1e-3, atol=1e-6):
        raise ValueError("a relation matrix must be finite and symmetric")
    if not np.isfinite(matrix.norm) or matrix.norm < 0 or matrix.norm > float(np.finfo(np.float32).max):
        raise ValueError(f"the norm of a relation matrix is {matrix.norm}, expected a float32 of at least 0")
    frobenius = float(np.linalg.norm(values.astype(np.float64)))
    if abs(frobenius - (1.0 if matrix.norm > 0 else 0.0)) > NORM_TOLERANCE:
        raise ValueError(f"relation values have the norm {frobenius:.6g}, expected 1 (0 if norm is 0)")


def _encode_triangle(matrix: RelationMatrix) -> bytes:
    content = matrix.values[_triangle_indices(len(matrix.values))].astype("<f2").tobytes()
    decoded = _mirror_triangle(_read_fp16(memoryview(content)), len(matrix.values))
    return _add_header(_TRIANGLE_FP16, matrix, content, _compute_cosine_error(matrix.values, decoded))


def _encode_triangle_int8(matrix: RelationMatrix) -> bytes:
    """Encodes values as codes * s_i * s_j with s_i ~ sqrt(G_ii / 127).

    A Gram matrix has |G_ij| <= sqrt(G_ii G_jj), so the codes fit into int8.
    """
    values, n = matrix.values.astype(np.float64), len(matrix.values)
    scales = np.sqrt(np.maximum(np.diag(values), 0) / 127)
    row, column = _triangle_indices(n)
    unit = scales[row] * scales[column]
    codes = np.rint(np.divide(values[row, column], unit, out=np.zeros(len(unit)), where=unit > 0))
    codes = np.clip(codes, -127, 127).astype(np.int8)
    frobenius = float(np.linalg.norm(_mirror_triangle(codes * unit, n)))
    if matrix.norm > 0 and frobenius == 0:
        raise ValueError("the relation matrix has no positive diagonal value, so it is not a Gram matrix")
    scales = (scales / math.sqrt(frobenius or 1.0)).astype("<f4")  # so that the decoded norm is 1
    content = scales.tobytes() + codes.tobytes()
    decoded = _mirror_triangle(_read_int8(memoryview(content), n), n)
    return _add_header(_TRIANGLE_INT8, matrix, content, _compute_cosine_error(matrix.values, decoded))


def _encode_low_rank(matrix: RelationMatrix, max_cosine_error: float, *, int8: bool) -> bytes:
    """Returns the smallest of the int8 factor (if `int8`), the float16 factor and the float16 triangle."""
    if matrix.norm == 0:
        return _add_header(_FACTOR_INT8 if int8 else _FACTOR_FP16, matrix, b"", 0.0)
    values = matrix.values.astype(np.float64)
    eigenvalues, vectors = np.linalg.eigh((values + values.T) / 2)
    eigenvalues, vectors = np.maximum(eigenvalues[::-1], 0), vectors[:, ::-1]
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[largest, np.arange(len(values))])  # LAPACK leaves the signs open
    roots = vectors * np.sqrt(eigenvalues)  # (n, n) the first k columns are the best F of rank k
    kinds = (True, False) if int8 else (False,)
    factors = [_encode_factor(matrix, roots, max_cosine_error, int8=kind) for kind in kinds]
    payloads = [factor for factor in factors if factor is not None]
    return min(payloads, key=len) if payloads else _encode_triangle(matrix)


def _encode_factor(
    matrix: RelationMatrix, roots: NDArray[np.float64], max_cosine_error: float, *, int8: bool
) -> bytes | None:
    """Encodes F, with F F^T within the error, at the smallest rank that bisection finds.

    Returns None if the triangle is smaller. The best F of a rank uses the largest eigenvalues of G; its
    cosine is the root of the sum of their squares.
    """
    values, n = matrix.values.astype(np.float64), len(matrix.values)
    kind, bytes_per_value = (_FACTOR_INT8, 1) if int8 else (_FACTOR_FP16, 2)
    eigenvalues = (roots**2).sum(axis=0)
    cosines = np.sqrt(np.cumsum(eigenvalues**2)) / np.linalg.norm(values)
    least = int(np.searchsorted(cosines, 1 - max_cosine_error)) + 1
    most = min(n, (n * (n + 1) - 1) // (bytes_per_value * n + (4 if int8 else 0)))  # smaller than the triangle
    if least > most or eigenvalues[0] <= 0:
        return None

    def attempt(rank: int) -> tuple[bytes, float]:
        factor = roots[:, :rank]
        content = _encode_factor_content(factor / math.sqrt(np.linalg.norm(factor.T @ factor)), int8=int8)
        decoded = _read_factor(memoryview(content), n, rank, int8=int8)
        return content, _compute_factor_error(values, decoded)

    content, error = attempt(least)
    rank = least
    if error > max_cosine_error:  # rounding adds to the error
        low, rank = least, most
        content, error = attempt(most)
        if error > max_cosine_error:
            return None
        while rank - low > 1:
            middle = (low + rank) // 2
            tried = attempt(middle)
            if tried[1] > max_cosine_error:
                low = middle
            else:
                rank, (content, error) = middle, tried
    return _add_header(kind, matrix, content, error, rank=rank)


def _encode_factor_content(factor: NDArray[np.float64], *, int8: bool) -> bytes:
    if not int8:
        return factor.astype("<f2").tobytes()
    scales = np.abs(factor).max(axis=0) / 127
    codes = np.rint(np.divide(factor, scales, out=np.zeros_like(factor), where=scales > 0)).astype(np.int8)
    decoded = codes * scales
    frobenius = float(np.linalg.norm(decoded.T @ decoded))
    scales = (scales / math.sqrt(frobenius)).astype("<f4")  # so that the decoded norm is 1
    return scales.tobytes() + codes.tobytes()


def _encode_pooled(matrix: RelationMatrix, pool: int) -> bytes:
    n, pooled = len(matrix.values), _pool_matrix(matrix.values, pool)
    frobenius = float(np.linalg.norm(pooled))
    pooled = pooled / frobenius if frobenius > NOTHING_LEFT else np.zeros_like(pooled)
    content = pooled[_triangle_indices(len(pooled))].astype("<f2").tobytes()
    block = assign_grid_blocks(n, pool)
    spread = _mirror_triangle(_read_fp16(memoryview(content)), len(pooled))[block][:, block]
    return _add_header(_POOLED_FP16, matrix, content, _compute_cosine_error(matrix.values, spread), pool=pool)


def _pool_matrix(values: NDArray[np.float32], pool: int) -> NDArray[np.float64]:
    """Returns (m, m) P G P^T in float64, where P averages the rows of each block."""
    block = assign_grid_blocks(len(values), pool)
    mean = np.zeros((int(block[-1]) + 1, len(values)))
    mean[block, np.arange(len(values))] = 1 / np.bincount(block)[block]
    return mean @ values.astype(np.float64) @ mean.T


def _add_header(
    kind: int, matrix: RelationMatrix, content: bytes, error: float, *, rank: int = 0, pool: int = 0
) -> bytes:
    return _HEADER.pack(PAYLOAD_VERSION, kind, pool, len(matrix.values), rank, error) + content


def _read_header(view: memoryview) -> tuple[int, int, int, int, float]:
    """Returns kind, pool, n, k and error. CorruptPartError unless the payload has the implied length."""
    if len(view) < _HEADER.size:
        raise CorruptPartError(f"relation payload of {len(view)} bytes is shorter than a header, {_HEADER.size}")
    version, kind, pool, n, k, error = _HEADER.unpack_from(view)
    if version != PAYLOAD_VERSION:
        raise CorruptPartError(f"relation payload has version {version}, expected {PAYLOAD_VERSION}")
    if kind > _POOLED_FP16 or view[3] != 0 or not 1 <= n <= MAX_RELATION_ROWS:
        raise CorruptPartError(f"relation payload has no valid header: kind {kind}, n = {n}")
    pooled, ranked = kind == _POOLED_FP16, kind in (_FACTOR_FP16, _FACTOR_INT8)
    if not (pool >= 2 if pooled else pool == 0) or not (k <= n if ranked else k == 0):
        raise CorruptPartError(f"relation payload of kind {kind} has pool {pool} and rank {k}")
    if not 0 <= error <= 2:
        raise CorruptPartError(f"relation payload states a cosine error of {error}")
    expected = _HEADER.size + _count_content_bytes(kind, pool, n, k)
    if len(view) != expected:
        raise CorruptPartError(f"relation payload has {len(view)} bytes, n = {n} needs {expected}")
    return kind, pool, n, k, error


def _count_content_bytes(kind: int, pool: int, n: int, k: int) -> int:
    if kind == _POOLED_FP16:
        try:
            m = count_grid_blocks(n, pool)
        except ValueError as error:
            raise CorruptPartError(f"relation payload: {error}") from error
        return m * (m + 1)
    triangle = n * (n + 1)
    return (triangle, 4 * n + triangle // 2, 2 * n * k, 4 * k + n * k)[kind]


def _read_fp16(content: memoryview) -> NDArray[np.float32]:
    """Returns the packed triangle."""
    return _check_finite(np.frombuffer(content, "<f2").astype(np.float32))


def _read_int8(content: memoryview, n: int) -> NDArray[np.float32]:
    """Returns the packed triangle."""
    scales = _read_scales(content[: 4 * n])
    row, column = _triangle_indices(n)
    return np.frombuffer(content[4 * n :], np.int8) * scales.take(row) * scales.take(column)


def _read_factor(content: memoryview, n: int, k: int, *, int8: bool) -> NDArray[np.float64]:
    if not int8:
        return _check_finite(np.frombuffer(content, "<f2")).astype(np.float64).reshape(n, k)
    return np.frombuffer(content[4 * k :], np.int8).reshape(n, k) * _read_scales(content[: 4 * k]).astype(np.float64)


def _read_scales(content: memoryview) -> NDArray[np.float32]:
    """Returns int8 scales; those of a matrix of norm 1, or of its factor, must be within 0..1."""
    scales = _check_finite(np.frombuffer(content, "<f4"))
    if ((scales < 0) | (scales > 1)).any():
        raise CorruptPartError("relation payload has a scale outside 0..1")
    return scales


def _check_finite(values: NDArray) -> NDArray:
    if not np.isfinite(values).all():
        raise CorruptPartError("relation payload holds a value that is not a finite number")
    return values


def _mirror_triangle(triangle: NDArray, n: int) -> NDArray:
    """Returns the symmetric matrix of an upper triangle, in its dtype."""
    values = np.empty((n, n), triangle.dtype)
    upper = _triangle_indices(n)
    values[upper] = triangle
    values.T[upper] = triangle
    return values


def _check_norm(frobenius: float, norm: float) -> float:
    """Returns the norm to divide by. CorruptPartError unless it is about 1, or 0 if that of G is 0."""
    if abs(frobenius - (1.0 if norm > 0 else 0.0)) > DECODED_NORM_TOLERANCE or (norm == 0 and frobenius > 0):
        raise CorruptPartError(f"relation payload has the Frobenius norm {frobenius:.6g}, norm is {norm:.6g}")
    return frobenius if norm > 0 else 1.0


def _compute_cosine_error(original: NDArray, decoded: NDArray) -> float:
    """Returns 1 - cosine: half the squared distance at norm 1; 0 if both are zero, 1 if only one is."""
    a, b = original.astype(np.float64), decoded.astype(np.float64)
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    if norm_a == 0 or norm_b == 0:
        return 0.0 if norm_a == norm_b else 1.0
    return float(((a / norm_a - b / norm_b) ** 2).sum() / 2)


def _compute_factor_error(values: NDArray[np.float64], factor: NDArray[np.float64]) -> float:
    """Returns _compute_cosine_error(values, F F^T) without forming F F^T."""
    norms = np.linalg.norm(values) * np.linalg.norm(factor.T @ factor)
    return max(0.0, 1.0 - float(((values @ factor) * factor).sum() / norms))


@lru_cache(maxsize=4)
def _triangle_indices(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns row and column of each value of an upper triangle; cached, as most images have one size."""
    return np.triu_indices(n)


@lru_cache(maxsize=4)
def _diagonal_indices(n: int) -> NDArray[np.int64]:
    """Returns the positions of the diagonal in a packed upper triangle."""
    return np.arange(n) * n - np.arange(n) * (np.arange(n) - 1) // 2
