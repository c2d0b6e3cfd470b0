"""A byte changed anywhere, in any file of any family, segment or kind: the scan reports it and names the file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from storage.records.records import PartRecords
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.storage.damage import list_all_files
from tests.storage.family_cache import FAMILIES as OTHER_FAMILIES
from tests.storage.family_cache import make_family_identity, make_family_part, make_output_head
from tests.storage.synthetic_cache import write_cache

NUM_ROUNDS = 250  # of a flip in each of a cache's files
STEPS = (("relation", "images"), OTHER_FAMILIES)  # two segments: the second adds sequence and hidden


def write_segments(folder: Path) -> None:
    """Relation matrices and images, then a segment of sequence logprobs, hidden states and the head."""
    for families in STEPS:
        writer = CacheWriter.open(folder, make_family_identity(), families)
        if "hidden" in families:
            writer.put_head(make_output_head())
        for part in range(2):
            records = make_family_part(part)
            own = {family: getattr(records, family) for family in writer.segment.families}
            writer.write_part(part, PartRecords(tokens=records.tokens, **own))
        writer.seal()


def flip(path: Path, content: bytes, rng: random.Random) -> int:
    """Change one bit, or one byte, at a random place; returns the place."""
    damaged = bytearray(content)
    position = rng.randrange(len(content))
    damaged[position] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
    path.write_bytes(damaged)
    return position


@pytest.mark.parametrize("write", [lambda folder: write_cache(folder, num_samples=2), write_segments])
def test_a_flipped_byte_in_each_part_file_names_every_one_of_them(tmp_path, write):
    write(tmp_path)
    assert verify(tmp_path).ok
    whole = {path: path.read_bytes() for path in list_all_files(tmp_path) if path.suffix != ".json"}
    assert len(whole) in (8, 2 * 5 + 1)
    rng = random.Random(0)
    for _ in range(NUM_ROUNDS):
        positions = {path: flip(path, content, rng) for path, content in whole.items()}
        problems = verify(tmp_path).problems
        for path, position in positions.items():
            assert sum(str(path) in problem for problem in problems) == 1, (position, path, problems)
    for path, content in whole.items():
        path.write_bytes(content)
    assert verify(tmp_path).ok


def test_a_flipped_byte_in_any_document_is_reported(tmp_path):
    write_segments(tmp_path)
    documents = [path for path in list_all_files(tmp_path) if path.suffix == ".json"]
    assert len(documents) == 8  # cache.json, a segment, two manifests, four commits
    rng = random.Random(1)
    for path in documents:
        content = path.read_bytes()
        for _ in range(NUM_ROUNDS // 4):
            position = flip(path, content, rng)
            assert any(path.name in problem for problem in verify(tmp_path).problems), (position, path)
        path.write_bytes(content)
    assert verify(tmp_path).ok


def test_every_single_byte_of_a_file_is_covered(tmp_path):
    """Not at random: each byte in turn, footers, page headers and padding among them."""
    write_segments(tmp_path)
    path = list_all_files(tmp_path / "relation")[0]
    content = path.read_bytes()
    assert len(content) > 700
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert any(str(path) in problem for problem in verify(tmp_path).problems), position
