"""The records of a sample and of a part, and the key that an image's signals are stored under."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.records.sample_key import SampleKey
from storage.records.sparse_rows import SparseRows

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, eq=False)
class TailTotal:
    """The sum of the tails (all that is not an exact entry) of some rows."""

    total: NDArray[np.float64]  # (v,) sum over rows of the probabilities of tokens that are no exact entry
    num_rows: int


def check_image_path(path: str) -> str:
    """Returns the path if it is relative, has forward slashes and stays below its root; else ValueError."""
    if not path or "\0" in path or "\\" in path or path.startswith("/") or _DRIVE.match(path):
        raise ValueError(f"image path {path!r} must be relative, with forward slashes")
    parts = path.split("/")
    if ".." in parts or all(part in ("", ".") for part in parts):
        raise ValueError(f"image path {path!r} must stay inside its image root")
    return path


def compute_image_key(prefix_ids: Iterable[int], image_sha256s: Sequence[str], preprocessing_fingerprint: str) -> str:
    """Returns the key (sha256, hex) of an image's visual rows and relation matrix.

    `prefix_ids`: the token ids up to and including the image's own placeholder. `image_sha256s`: the
    hashes of all images so far, this one last. In a causal teacher the signals depend on nothing but
    these and the preprocessing.
    """
    ids = np.asarray(list(prefix_ids), dtype="<i4")
    digest = hashlib.sha256(b"stillhouse image key 1\0")
    digest.update(struct.pack("<Q", len(ids)) + ids.tobytes())
    digest.update(struct.pack("<Q", len(image_sha256s)) + "".join(image_sha256s).encode())
    digest.update(preprocessing_fingerprint.encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class ImageRef:
    """One image of a sample. Errors: ValueError for a path outside the root or a malformed hash."""

    path: str  # relative to the image root
    sha256: str  # of the file's bytes, in hex
    num_visual_tokens: int  # positions in the teacher's sequence, 1 or more
    key: str  # see compute_image_key

    def __post_init__(self) -> None:
        check_image_path(self.path)
        for name in ("sha256", "key"):
            if not _SHA256.fullmatch(getattr(self, name)):
                got = getattr(self, name)
                raise ValueError(f"{name} of image {self.path} is {got!r}, expected 64 hex digits")
        if self.num_visual_tokens < 1:
            raise ValueError(f"image {self.path} has {self.num_visual_tokens} visual tokens, expected 1 or more")

    def file(self, root: str | Path) -> Path:
        """Returns the image's path below `root`."""
        return Path(root) / self.path


@dataclass(frozen=True, eq=False)
class TokensRecord:
    """A sample's conversation as token ids, with one placeholder token per image.

    t token ids; each image is expanded to its visual tokens only when a batch is collated.
    """

    key: SampleKey
    split: str
    category: str
    token_ids: NDArray[np.int32]  # (t,)
    response_mask: NDArray[np.bool_]  # (t,) True where a loss counts
    images: tuple[ImageRef, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.key, SampleKey):
            raise TypeError(f"key is {self.key!r}, expected a SampleKey, such as SampleKey({self.key!r})")

    @property
    def sample_id(self) -> str:
        """The key's text, unique in a cache."""
        return self.key.sample_id

    @property
    def num_response_tokens(self) -> int:
        """The number of tokens where a loss counts: one response row each."""
        return int(np.count_nonzero(self.response_mask))


@dataclass(frozen=True, eq=False)
class RelationMatrix:
    """G / ||G||: the Gram matrix G of an image's visual rows of raw logits, at Frobenius norm 1."""

    values: NDArray[np.float32]  # (n, n), symmetric, of norm 1 (all zero if G is)
    norm: float  # of G

    @property
    def num_visual_tokens(self) -> int:
        return len(self.values)


@dataclass(frozen=True, eq=False)
class RelationFactor:
    """G / ||G|| as F F^T, which avoids (n, n) matrices: <F F^T, A> = sum(F * (A F))."""

    factor: NDArray[np.float32]  # (n, k); F F^T has norm 1 (k is 0 if G is zero)
    norm: float  # of G

    @property
    def num_visual_tokens(self) -> int:
        return len(self.factor)

    @property
    def values(self) -> NDArray[np.float32]:
        """(n, n) F F^T, computed at each access."""
        return self.factor @ self.factor.T


@dataclass(frozen=True, eq=False)
class PooledRelation:
    """The Gram matrix of visual rows averaged over pool x pool blocks of the square grid, at norm 1.

    Compare it with student rows averaged over the same blocks: see relation_matrix.assign_grid_blocks.
    """

    values: NDArray[np.float32]  # (m, m), symmetric, of norm 1 (all zero if the pooled G is)
    norm: float  # of the pooled G
    num_visual_tokens: int  # n, before pooling
    pool: int


Relation = RelationMatrix | RelationFactor | PooledRelation  # a reader returns any; a dump writes RelationMatrix


@dataclass(frozen=True)
class SequenceLogprob:
    """The teacher's log-probability of a sample's whole response."""

    logprob: float  # float32 sum over response tokens, nats; 0 for an empty response
    num_tokens: int  # response tokens


@dataclass(frozen=True, eq=False)
class SampleRecord:
    """One sample with the requested families; None or empty for families that were not requested.

    Legend: r response tokens, d hidden size.
    """

    tokens: TokensRecord
    response: SparseRows | None = None  # row r is the distribution of response token r
    visual: Mapping[str, SparseRows] = field(default_factory=dict)  # by image key
    relation: Mapping[str, Relation] = field(default_factory=dict)  # by image key
    hidden: NDArray[np.float32] | None = None  # (r, d) final-norm states; StoredHead.logits gives their logits
    sequence: SequenceLogprob | None = None


@dataclass(frozen=True)
class SampleError:
    """A sample of the plan that has no record, with the reason."""

    sample_id: str
    reason: str
    key: SampleKey | None = field(default=None, compare=False)  # known of a row of data.sources that has an id

    def __str__(self) -> str:
        """Returns id and reason in one line; the id "row N" is left out if the reason begins with N."""
        place = self.sample_id.removeprefix("row ")
        return self.reason if self.reason.startswith(f"{place}: ") else f"{self.sample_id}: {self.reason}"


@dataclass(frozen=True, eq=False)
class PartRecords:
    """The records of one part, as a dump passes them to CacheWriter.write_part.

    A family is None if the cache does not store it. Each sample of the part is either in `tokens` or in
    `errors`. Legend: r response tokens of a sample, d hidden size.
    """

    tokens: Sequence[TokensRecord]
    response: Sequence[SparseRows] | None = None  # aligned with tokens, a row for each response token
    visual: Mapping[str, SparseRows] | None = None  # by the keys of the samples' images
    relation: Mapping[str, RelationMatrix] | None = None  # likewise
    errors: Sequence[SampleError] = ()
    hidden: Sequence[NDArray[np.float32]] | None = None  # aligned with tokens, (r, d) for its r response tokens
    sequence: Sequence[SequenceLogprob] | None = None  # aligned with tokens
    images: Mapping[str, bytes] | None = None  # the images' files by their sha256
    tail_totals: Mapping[str, TailTotal] = field(default_factory=dict)  # by family, of the parts that keep them
    teacher_noise: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by family: KL in nats per row


def reorder(records: PartRecords, places: Sequence[int]) -> PartRecords:
    """Returns the records of the samples at `places`, in that order, with the images that they show."""
    if list(places) == list(range(len(records.tokens))):
        return records
    tokens = [records.tokens[place] for place in places]
    images = [image for record in tokens for image in record.images]
    keys = {*(image.key for image in images), *(image.sha256 for image in images)}
    changes: dict[str, Any] = {"tokens": tokens}
    for each in fields(records):
        value = getattr(records, each.name)
        if isinstance(value, Mapping) and each.name in ("visual", "relation", "images"):
            changes[each.name] = {key: signal for key, signal in value.items() if key in keys}
        elif isinstance(value, Sequence) and each.name not in ("tokens", "errors"):
            changes[each.name] = [value[place] for place in places]
    return replace(records, **changes)
