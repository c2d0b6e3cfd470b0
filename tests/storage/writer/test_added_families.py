"""Hidden states with their head, images and sequence logprobs, added to a cache that is there; in stores too."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

import fsspec
import numpy as np
import pytest

from storage.backends.folder import open_folder
from storage.errors import CacheError, CorruptPartError
from storage.layout.documents import Commit, Manifest, parse_document
from storage.reader.cache import Cache
from storage.records.records import PartRecords, SampleError
from storage.records.sample_key import SampleKey
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.storage.damage import flip_bytes, list_all_files
from tests.storage.family_cache import (
    FAMILIES,
    make_family_identity,
    make_family_part,
    make_image_file,
    make_output_head,
    write_family_cache,
)

STEPS = (("relation",), ("relation", "hidden"), FAMILIES)  # of three dumps, each over the same samples
FLIPS_PER_FILE = 8


@pytest.fixture(params=["folder", "store"])
def place(request, tmp_path):
    """Where a cache may lie: a folder, or fsspec's store in memory."""
    if request.param == "folder":
        yield str(tmp_path / "cache")
    else:
        url = f"memory://bucket-{secrets.token_hex(4)}/cache"
        yield url
        fsspec.filesystem("memory").rm(url.rpartition("/")[0], recursive=True)


def keep_families(records: PartRecords, families) -> PartRecords:
    return dataclasses.replace(records, **{name: None for name in FAMILIES if name not in families})


def dump(place, families, *, change=lambda records: records, first=0, append=False, **changes: Any) -> CacheWriter:
    """What a dump of some families does, over two parts that make_family_part numbers from `first` on."""
    identity = make_family_identity().model_copy(update=changes)
    writer = CacheWriter.open(place, identity, families, append=append)
    held = writer.segment.families
    if "hidden" in held:
        writer.put_head(make_output_head())
    for part in range(2):
        writer.write_part(part, keep_families(change(make_family_part(first + part)), held))
    writer.seal()
    return writer


def append(place, families=FAMILIES) -> CacheWriter:
    return dump(place, families, first=2, append=True, plan_fingerprint="f" * 8)


def list_objects(place):
    folder = open_folder(place)
    return {name: folder.read(name) for name in folder.list_files(deep=True)}


def image_bytes(cache, index):
    return [cache.image_bytes(index, image.sha256) for image in cache.read(index).tokens.images]


def assert_same_records(one: Cache, other: Cache) -> None:
    assert one.sample_ids == other.sample_ids
    for index in range(one.num_samples):
        a, b = one.read(index), other.read(index)
        np.testing.assert_array_equal(a.hidden, b.hidden)
        assert a.sequence == b.sequence is not None
        assert a.relation.keys() == b.relation.keys()
        assert all(np.array_equal(matrix.values, b.relation[key].values) for key, matrix in a.relation.items())
        assert image_bytes(one, index) == image_bytes(other, index)
    np.testing.assert_array_equal(one.head().weight, other.head().weight)


def test_families_added_later_make_the_cache_that_one_dump_makes(place, tmp_path):
    write_family_cache(tmp_path / "at once")
    for number, families in enumerate(STEPS):
        before = list_objects(place)
        assert dump(place, families).segment.number == number
        after = list_objects(place)
        assert {name: after[name] for name in before} == before
    cache, at_once = Cache.open(place), Cache.open(tmp_path / "at once")
    assert cache.sealed
    assert cache.families == ("tokens", *FAMILIES)
    assert_same_records(cache, at_once)
    assert cache.statistics() == at_once.statistics()
    report = verify(place)
    assert report.problems == report.notes == []
    assert report.num_segments == 3
    assert report.num_bytes == cache.statistics()["bytes"]


def test_the_segment_of_the_hidden_states_names_head_and_errors(tmp_path):
    for families in STEPS:
        dump(tmp_path, families)
    manifests = [parse_document((tmp_path / name).read_bytes(), Manifest, name) for name in
                 ("manifest.json", "manifest-0001.json", "manifest-0002.json")]  # fmt: skip
    assert [set(each.errors_by_family or {}) for each in manifests] == [{"relation"}, {"hidden"}, set()]
    assert [each.head is not None for each in manifests] == [False, True, False]
    assert [set(each.bytes_by_family) for each in manifests] == [
        {"tokens", "relation"}, {"hidden", "head"}, {"sequence", "images"},
    ]  # fmt: skip
    commit = parse_document((tmp_path / "commits/0001/part-00001.json").read_bytes(), Commit, "commit")
    assert commit.head == manifests[1].head


def test_only_what_is_asked_for_is_opened(place):
    for families in STEPS:
        dump(place, families)
    folder = open_folder(place)
    for name in (*folder.list_files("images"), *folder.list_files("relation"), *folder.list_files("head")):
        folder.remove(name)
    cache = Cache.open(place, ("hidden",))
    record = cache.read(0)
    expected = make_family_part(0).hidden
    assert expected is not None
    assert record.hidden is not None
    np.testing.assert_allclose(record.hidden, expected[0], rtol=2**-10, atol=1e-6)  # float16
    assert record.sequence is None
    with pytest.raises(CorruptPartError, match=r"head/head.*cannot be read"):
        cache.head()


def test_samples_appended_with_hidden_states_share_the_head(place):
    dump(place, FAMILIES)
    append(place)
    report = verify(place)
    assert report.problems == report.notes == []
    cache = Cache.open(place)
    index = cache.index_of("3-shared")
    assert image_bytes(cache, index) == [make_image_file(3, 0)]
    assert len(open_folder(place).list_files("head")) == 1
    assert cache.statistics()["bytes"] == report.num_bytes
    assert cache.statistics()["errors_by_family"]["hidden"]["count"] == 4 * 10  # parts, response tokens


def test_samples_appended_without_a_family_are_named(tmp_path):
    dump(tmp_path, FAMILIES)
    append(tmp_path, ("relation", "sequence"))
    cache = Cache.open(tmp_path)
    assert cache.families == ("tokens", "relation", "sequence")
    with pytest.raises(CacheError, match=r"not hidden, of all parts: 2 of 4 lack it, part 2 first; segment 1"):
        Cache.open(tmp_path, ("hidden",))
    assert verify(tmp_path).problems == []


def test_another_head_is_refused_before_a_row_is_scored(place):
    dump(place, FAMILIES)
    identity = make_family_identity().model_copy(update={"plan_fingerprint": "f" * 8})
    writer = CacheWriter.open(place, identity, FAMILIES, append=True)
    with pytest.raises(CacheError, match="were made with the output head head/"):
        writer.put_head(make_output_head(seed=1))


def test_segments_of_different_heads_are_not_sealed(tmp_path):
    """Two dumps that run at once, and put their heads before either commits."""
    identity = make_family_identity()
    writers = [CacheWriter.open(tmp_path, identity, FAMILIES)]
    identity = identity.model_copy(update={"plan_fingerprint": "f" * 8})
    writers.append(CacheWriter.open(tmp_path, identity, FAMILIES, append=True))
    for seed, writer in enumerate(writers):
        writer.put_head(make_output_head(seed=seed))
    for number, writer in enumerate(writers):
        for part in range(2):
            writer.write_part(part, make_family_part(2 * number + part))
    for writer in writers:
        with pytest.raises(CacheError, match="name different output heads"):
            writer.seal()
    assert any("name different output heads" in problem for problem in verify(tmp_path).problems)
    with pytest.raises(CacheError, match="name different output heads"):
        Cache.open(tmp_path).head()


def test_sealing_another_segment_keeps_the_head_of_a_running_dump(place):
    dump(place, ("relation",))
    running = CacheWriter.open(place, make_family_identity(), ("hidden",))
    running.put_head(make_output_head())
    dump(place, ("sequence",))
    for part in range(2):
        running.write_part(part, keep_families(make_family_part(part), ("hidden",)))
    running.seal()
    report = verify(place)
    assert report.problems == report.notes == []


def drop_samples(names):
    """A change to records: some samples become errors."""

    def change(records):
        at = [row for row, record in enumerate(records.tokens) if record.sample_id[2:] not in names]
        gone = [record.sample_id for record in records.tokens if record.sample_id[2:] in names]
        tokens = [records.tokens[row] for row in at]
        images = [image for record in tokens for image in record.images]
        return dataclasses.replace(
            records,
            tokens=tokens,
            hidden=[records.hidden[row] for row in at],
            sequence=[records.sequence[row] for row in at],
            relation={image.key: records.relation[image.key] for image in images},
            images={image.sha256: records.images[image.sha256] for image in images},
            errors=[SampleError(name, "?") for name in gone],
        )

    return change


def reverse_records(records):
    return dataclasses.replace(
        records, tokens=records.tokens[::-1], hidden=records.hidden[::-1], sequence=records.sequence[::-1]
    )


def test_samples_that_the_cache_lacks_are_left_out_of_every_family(tmp_path):
    """The first dump could not do the samples of an image; the later ones can, and in another order."""
    lacking = drop_samples(("pair#chosen", "pair#rejected"))
    dump(tmp_path / "at once", FAMILIES, change=lacking)
    dump(tmp_path / "later", ("relation",), change=lacking)
    dump(tmp_path / "later", FAMILIES, change=reverse_records)
    assert verify(tmp_path / "later").problems == []
    assert_same_records(Cache.open(tmp_path / "later"), Cache.open(tmp_path / "at once"))


def test_sequence_is_not_added_to_half_a_pair(tmp_path):
    dump(tmp_path, ("relation",), change=drop_samples(("pair#rejected",)))
    with pytest.raises(CacheError, match=r"sample 0-pair#chosen: its part holds no 0-pair#rejected.*created without"):
        dump(tmp_path, ("relation", "sequence"))


def test_a_family_is_not_added_to_another_key_of_the_same_text(tmp_path):
    def make_plain(records):
        tokens = [dataclasses.replace(record, key=SampleKey(record.sample_id)) for record in records.tokens]
        return dataclasses.replace(records, tokens=tokens)

    dump(tmp_path, ("relation",))
    with pytest.raises(CacheError, match="sample '0-pair#chosen': its row_id differ from those of segment 0"):
        dump(tmp_path, ("relation", "hidden"), change=make_plain)


def test_any_flipped_byte_of_any_segment_is_found(tmp_path):
    for families in STEPS:
        dump(tmp_path, families)
    files = list_all_files(tmp_path)
    assert len(files) == 3 * (1 + 2 + 1) + 1 + 2 * (1 + len(FAMILIES))
    for damage in flip_bytes(files, FLIPS_PER_FILE):
        assert verify(tmp_path).problems, damage
    assert verify(tmp_path).problems == []
