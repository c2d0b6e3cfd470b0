"""Parquet files of any bytes: refused by name, or read as valid rows; never much memory for a small file."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.backends.folder import LocalFolder
from storage.encoding.distributions import RowFormat
from storage.encoding.parquet_schema import SCHEMAS
from storage.errors import CorruptPartError
from storage.layout.documents import FileEntry
from storage.reader.row_group_cache import RowGroupCache
from tests.storage.family_cache import write_family_cache
from tests.storage.synthetic_cache import TAU, VOCAB_SIZE, write_cache

REPOSITORY = Path(__file__).parents[3]
NUM_DAMAGES = 400  # of each family
KEPT = RowFormat(VOCAB_SIZE, TAU, 0.0, 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, int]]:
    """A file of each family, and its rows."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    write_cache(first)
    write_family_cache(second)
    found = {}
    for folder in (first, second):
        for path in sorted(folder.glob("*/part-00000*.parquet")):
            found[path.parent.name] = path.read_bytes()
    return {family: (content, len(pq.read_table(pa.BufferReader(content)))) for family, content in found.items()}


def make_entry(content: bytes, num_rows: int) -> FileEntry:
    return FileEntry(
        file="x.parquet", rows=num_rows, file_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )


def read_all(folder: Path, family: str, content: bytes, num_rows: int) -> None:
    """As a reader does, the file's own checksum left out."""
    (folder / "x.parquet").write_bytes(content)
    entry = make_entry(content, num_rows)
    part_files = RowGroupCache(LocalFolder(folder), max_bytes=1 << 20, checksums=False)
    part_files.read_columns(family, entry, SCHEMAS[family].names[:1])
    for row in range(num_rows):
        if family in ("response", "visual"):
            part_files.read_distribution_rows(family, entry, row, KEPT)
        else:
            part_files.read_row(family, entry, row)


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut out, doubled or made up, most often near the end, where the footer is."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed)) if rng.random() < 0.5 else len(changed) - 1 - rng.randrange(len(changed) // 3)
        kind = rng.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            del changed[at : at + rng.randint(1, 20)]
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 20)]
    return bytes(changed)


@pytest.mark.parametrize("family", SCHEMAS)
def test_damaged_parquet_is_refused_or_read(tmp_path, files, family):
    content, num_rows = files[family]
    read_all(tmp_path, family, content, num_rows)
    rng, refused = random.Random(0), 0
    for _ in range(NUM_DAMAGES):
        try:
            read_all(tmp_path, family, damage_bytes(content, rng), num_rows)
        except CorruptPartError as error:
            refused += str(tmp_path / "x.parquet") in str(error)
    assert refused > NUM_DAMAGES / 2


@pytest.mark.parametrize("family", SCHEMAS)
def test_arbitrary_bytes_are_no_parquet(tmp_path, family):
    rng = random.Random(1)
    for size in range(60):
        noise = rng.randbytes(size)
        for content in (noise, b"PAR1" + noise + b"PAR1", b"PAR1" + noise + size.to_bytes(4, "little") + b"PAR1"):
            with pytest.raises(CorruptPartError):
                read_all(tmp_path, family, content, 1)


def test_a_row_group_that_would_grow_in_memory_is_refused_before_it_does(tmp_path):
    """Another process makes it, so that this one's memory shows what reading costs."""
    code = (
        "import sys; from storage.encoding.parquet_schema import encode_parquet\n"
        "row = {'image_key': 'a' * 64, 'num_rows': 1, 'norm': 1.0, 'payload': bytes(300 << 20)}\n"
        "sys.stdout.buffer.write(encode_parquet('relation', [[row]], zstd_level=1, metadata={}))\n"
    )
    bomb = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=True).stdout
    assert len(bomb) < 1 << 20
    before = pa.default_memory_pool().max_memory() or 0
    with pytest.raises(CorruptPartError, match=r"x\.parquet: row group 0 claims 314,.* bytes, of a file of"):
        read_all(tmp_path, "relation", bomb, 1)
    assert (pa.default_memory_pool().max_memory() or 0) - before < 64 << 20
