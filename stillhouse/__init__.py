"""Stillhouse's Python API: open, read, iterate, write and verify a cache of a teacher's logprobs.

    import stillhouse

    cache = stillhouse.open_cache("runs/digits/cache")
    for sample in cache:  # a SampleRecord; cache.read(7) and cache.read_many([3, 1]) read by position
        rows = sample.response  # SparseRows: row i is the distribution of the answer's token i

A writer makes a `CacheWriter` of an `Identity` and gives it `PartRecords`, part by part. Arrays are numpy's, logprobs
are natural logarithms at temperature 1, and every error is a `StillhouseError`. Classes and functions are imported when
they are first used, so that `import stillhouse` alone loads neither numpy nor pyarrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Not even storage is imported here: `python -m stillhouse` runs this file before __main__.py takes the current folder,
# where a user's own storage.py may lie, off the search path. Type checkers do not see through __getattr__.
if TYPE_CHECKING:
    from pathlib import Path

    from storage.encoding.output_head import StoredHead
    from storage.errors import (
        CacheError,
        ConfigError,
        CorruptPartError,
        IdentityError,
        MissingFamilyError,
        NoCacheError,
        StillhouseError,
        WriteError,
    )
    from storage.identity import Identity, compute_tokenizer_fingerprint
    from storage.images.settings import PixelSettings
    from storage.reader.cache import Cache
    from storage.reader.narrowing import Narrowing
    from storage.reader.prefetch import shuffled_batches
    from storage.records.preference_pairs import PreferencePair
    from storage.records.records import (
        ImageRef,
        PartRecords,
        PooledRelation,
        RelationFactor,
        RelationMatrix,
        SampleError,
        SampleRecord,
        SequenceLogprob,
        TokensRecord,
        compute_image_key,
    )
    from storage.records.sample_batch import SampleBatch
    from storage.records.sample_key import SampleKey
    from storage.records.sparse_rows import SparseRows
    from storage.verify.scan_cache import VerifyReport, verify
    from storage.writer.cache_writer import CacheWriter

__all__ = [
    "Cache",
    "CacheError",
    "CacheWriter",
    "ConfigError",
    "CorruptPartError",
    "Identity",
    "IdentityError",
    "ImageRef",
    "MissingFamilyError",
    "Narrowing",
    "NoCacheError",
    "PartRecords",
    "PixelSettings",
    "PooledRelation",
    "PreferencePair",
    "RelationFactor",
    "RelationMatrix",
    "SampleBatch",
    "SampleError",
    "SampleKey",
    "SampleRecord",
    "SequenceLogprob",
    "SparseRows",
    "StillhouseError",
    "StoredHead",
    "TokensRecord",
    "VerifyReport",
    "WriteError",
    "compute_image_key",
    "compute_tokenizer_fingerprint",
    "open_cache",
    "shuffled_batches",
    "verify",
]  # fmt: skip

_LAZY_NAMES = {  # by the module that defines them
    "storage.encoding.output_head": ("StoredHead",),
    "storage.errors": (
        "CacheError", "ConfigError", "CorruptPartError", "IdentityError", "MissingFamilyError", "NoCacheError",
        "StillhouseError", "WriteError",
    ),
    "storage.identity": ("Identity", "compute_tokenizer_fingerprint"),
    "storage.images.settings": ("PixelSettings",),
    "storage.reader.cache": ("Cache",),
    "storage.reader.narrowing": ("Narrowing",),
    "storage.reader.prefetch": ("shuffled_batches",),
    "storage.records.preference_pairs": ("PreferencePair",),
    "storage.records.records": (
        "ImageRef", "PartRecords", "PooledRelation", "RelationFactor", "RelationMatrix", "SampleError", "SampleRecord",
        "SequenceLogprob", "TokensRecord", "compute_image_key",
    ),
    "storage.records.sample_batch": ("SampleBatch",),
    "storage.records.sample_key": ("SampleKey",),
    "storage.records.sparse_rows": ("SparseRows",),
    "storage.verify.scan_cache": ("VerifyReport", "verify"),
    "storage.writer.cache_writer": ("CacheWriter",),
}  # fmt: skip
_LAZY_MODULES = {name: module for module, names in _LAZY_NAMES.items() for name in names}


def open_cache(
    path: str | Path,
    families: Sequence[str] | None = None,
    *,
    max_bytes: int = 256 << 20,
    checksums: bool | None = None,
    narrowing: Mapping[str, Narrowing] | None = None,
) -> Cache:
    """The cache at `path`, a folder or a URL such as s3://bucket/prefix, sealed or still growing.

    Tokens are always read, and with them the signals of `families`: response, visual, relation, hidden, sequence and
    images; None stands for all that the cache holds. `max_bytes` of decoded rows are kept in memory. `checksums`
    compares each file's sha256 when it is first used; None does so in a local folder, not in an object store.
    `narrowing`, by family, reads fewer entries of each row than are stored.

    Errors: NoCacheError if there is no cache at `path`, MissingFamilyError if it lacks a family, ConfigError if its
    rows cannot be narrowed as asked, CorruptPartError for a damaged file. All are kinds of StillhouseError.
    """
    from storage.reader.cache import Cache  # numpy and pyarrow: half a second

    return Cache.open(path, families, max_bytes=max_bytes, checksums=checksums, narrowing=narrowing)


if not TYPE_CHECKING:  # to a type checker, a module with __getattr__ has every attribute, misspelt ones too

    def __getattr__(name: str) -> Any:
        """Imports a class or function of the API when it is first used."""
        if name not in _LAZY_MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_LAZY_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
