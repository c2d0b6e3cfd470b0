"""Families added to a cache that is there, samples appended to it, and what is refused on the way."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import numpy as np
import pytest

from storage.backends.folder import LocalFolder
from storage.errors import CacheError, CorruptPartError, IdentityError
from storage.layout.segments import NewSegment, find_segment, read_segments
from storage.reader.cache import Cache
from storage.records.records import PartRecords, SampleError
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.storage.synthetic_cache import FAMILIES, SAMPLES_PER_PART, make_identity, make_part, write_cache

TOKENS_ONLY: dict[str, Any] = {"teacher_fingerprint": "none", "dtype": "none", "engine": "none"}
NEW_PLAN = {"plan_fingerprint": "f" * 8, "num_parts": 3}


def read_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add_families(folder, families, *, parts=2, **changes) -> CacheWriter:
    """A dump of some families over the samples that are there."""
    writer = CacheWriter.open(folder, make_identity(num_parts=parts, **changes), families)
    for part in sorted(set(range(parts)) - writer.committed_parts()):
        writer.write_part(part, make_part(part, families=writer.segment.families))
    writer.seal()
    return writer


def append_samples(folder, families=FAMILIES, *, first=2, **changes) -> CacheWriter:
    """A dump of new samples: those that make_part numbers from `first` on."""
    identity = make_identity(**{**NEW_PLAN, **changes})
    writer = CacheWriter.open(folder, identity, families, append=True)
    for part in sorted(set(range(3)) - writer.committed_parts()):
        writer.write_part(part, make_part(first + part, families=writer.segment.families))
    writer.seal()
    return writer


def assert_same_records(one: Cache, other: Cache) -> None:
    assert one.sample_ids == other.sample_ids
    for index in range(one.num_samples):
        a, b = one.read(index), other.read(index)
        np.testing.assert_array_equal(a.tokens.token_ids, b.tokens.token_ids)
        assert a.response is not None
        assert b.response is not None
        assert a.response.equals(b.response)
        assert a.visual.keys() == b.visual.keys()
        assert all(rows.equals(b.visual[key]) for key, rows in a.visual.items())
        assert all(np.array_equal(matrix.values, b.relation[key].values) for key, matrix in a.relation.items())


def test_families_added_one_by_one_make_the_cache_that_one_dump_makes(tmp_path):
    write_cache(tmp_path / "at once")
    write_cache(tmp_path / "later", families=("response",))
    before = read_files(tmp_path / "later")
    assert add_families(tmp_path / "later", ("response", "visual")).segment.number == 1
    assert add_families(tmp_path / "later", FAMILIES).segment.families == ("relation",)
    after = read_files(tmp_path / "later")
    assert {name: after[name] for name in before} == before  # nothing that was there has changed
    assert {"segments/0001.json", "commits/0001/part-00000.json", "manifest-0002.json"} <= set(after)
    cache = Cache.open(tmp_path / "later")
    assert cache.sealed
    assert cache.families == ("tokens", *FAMILIES)
    assert_same_records(cache, Cache.open(tmp_path / "at once"))
    got, expected = cache.statistics(), Cache.open(tmp_path / "at once").statistics()
    assert got == expected
    report = verify(tmp_path / "later")
    assert report.problems == report.notes == []
    assert (report.num_segments, report.num_parts, report.sealed) == (3, 2, True)
    assert report.num_errors == expected["num_errors"]
    assert report.num_rows == expected["num_rows"]


def test_a_cache_of_tokens_alone_gets_its_teacher_later(tmp_path):
    writer = CacheWriter.open(tmp_path, make_identity(selection={}, **TOKENS_ONLY), ())
    for part in range(2):
        writer.write_part(part, make_part(part, families=()))
    writer.seal()
    add_families(tmp_path, ("response",))
    cache = Cache.open(tmp_path)
    assert cache.identity.teacher_fingerprint == "a" * 8
    assert cache.identity.selection.keys() == {"response"}
    assert verify(tmp_path).problems == []
    with pytest.raises(IdentityError, match="teacher_fingerprint: cache has 'aaaaaaaa', this run has 'zz'"):
        add_families(tmp_path, ("visual",), teacher_fingerprint="zz")


def test_appended_samples_read_after_the_others(tmp_path):
    write_cache(tmp_path / "at once", num_parts=5)
    write_cache(tmp_path / "later")
    before = read_files(tmp_path / "later")
    writer = append_samples(tmp_path / "later")
    assert (writer.segment.number, writer.segment.first_part) == (1, 2)
    after = read_files(tmp_path / "later")
    assert {name: after[name] for name in before} == before
    assert "commits/0001/part-00004.json" in after
    cache = Cache.open(tmp_path / "later")
    assert cache.sealed
    assert cache.num_samples == 5 * SAMPLES_PER_PART
    assert len(cache.errors) == 5
    assert_same_records(cache, Cache.open(tmp_path / "at once"))
    assert verify(tmp_path / "later").problems == []
    append_samples(tmp_path / "later")  # once more: it is complete
    assert read_files(tmp_path / "later") == after


def test_another_plan_is_refused_unless_append_is_said(tmp_path):
    write_cache(tmp_path)
    before = read_files(tmp_path)
    with pytest.raises(IdentityError, match=r"cache\.append: true.*\n  plan_fingerprint: .*\n  num_parts: "):
        CacheWriter.open(tmp_path, make_identity(**NEW_PLAN), FAMILIES)
    with pytest.raises(IdentityError, match=r"\n  selection\.response\.tau: cache has 0\.03, this run has 0\.5\n"):
        CacheWriter.open(tmp_path, make_identity(tau=0.5, **NEW_PLAN), ("response", "visual"), append=True)
    with pytest.raises(IdentityError, match="vocab_size: cache has 300, this run has 299"):
        CacheWriter.open(tmp_path, make_identity(vocab_size=299, **NEW_PLAN), FAMILIES, append=True)
    assert read_files(tmp_path) == before


def test_a_sample_that_is_there_is_not_appended_again(tmp_path):
    write_cache(tmp_path)
    before = read_files(tmp_path)
    for ids in (["new", "sample-1-0"], ["broken-1"]):
        with pytest.raises(CacheError, match=r"1 of the samples to append are in the cache already: '.*-1"):
            CacheWriter.open(tmp_path, make_identity(**NEW_PLAN), FAMILIES, append=True, sample_ids=ids)
    assert read_files(tmp_path) == before
    writer = CacheWriter.open(tmp_path, make_identity(**NEW_PLAN), FAMILIES, append=True, sample_ids=["new"])
    before = read_files(tmp_path)
    for part in (make_part(1), PartRecords([], [], {}, {}, [SampleError("broken-1", "?")])):
        with pytest.raises(CacheError, match=r"in the cache already: '(sample-1-0|broken-1)'.* is in part 1"):
            writer.write_part(0, part)
    assert read_files(tmp_path) == before


def test_families_can_be_added_to_appended_samples(tmp_path):
    write_cache(tmp_path, families=("response",))
    append_samples(tmp_path, ("response",))
    add_families(tmp_path, FAMILIES)
    with pytest.raises(CacheError) as caught:
        Cache.open(tmp_path, families=("visual",))
    assert "holds tokens, response, not visual, of all parts: 3 of 5 lack it, part 2 first" in str(caught.value)
    assert "segment 1 (parts 2 to 4) was dumped without it" in str(caught.value)
    assert Cache.open(tmp_path).families == ("tokens", "response")
    writer = CacheWriter.open(tmp_path, make_identity(**NEW_PLAN), FAMILIES)
    assert (writer.segment.number, writer.segment.adds_to, writer.segment.first_part) == (3, 1, 2)
    for part in range(3):
        writer.write_part(part, make_part(2 + part, families=("visual", "relation")))
    writer.seal()
    write_cache(tmp_path / "at once", num_parts=5)
    assert_same_records(Cache.open(tmp_path), Cache.open(tmp_path / "at once"))
    shutil.rmtree(tmp_path / "at once")
    report = verify(tmp_path)
    assert report.problems == report.notes == []


def test_a_family_that_is_still_being_added_is_refused_and_the_others_are_read(tmp_path):
    write_cache(tmp_path, families=("response",))
    writer = CacheWriter.open(tmp_path, make_identity(), ("response", "visual"))
    writer.write_part(1, make_part(1, families=("visual",)))
    cache = Cache.open(tmp_path, ("response",))
    assert cache.sealed
    assert cache.read(0).response is not None
    with pytest.raises(CacheError, match=r"1 of 2 lack it, part 0 first; .*from segment 1, not finished"):
        Cache.open(tmp_path, ("visual",))
    assert any("segment 1 is not sealed, 1 of 2" in problem for problem in verify(tmp_path).problems)
    writer.write_part(0, make_part(0, families=("visual",)))
    assert not Cache.open(tmp_path, ("visual",)).sealed
    writer.seal()
    assert Cache.open(tmp_path, ("visual",)).sealed


def test_appended_parts_are_read_while_they_are_written(tmp_path):
    write_cache(tmp_path)
    writer = CacheWriter.open(tmp_path, make_identity(**NEW_PLAN), FAMILIES, append=True)
    writer.write_part(1, make_part(3))
    cache = Cache.open(tmp_path)
    assert not cache.sealed
    assert cache.num_samples == 3 * SAMPLES_PER_PART
    assert cache.read(cache.index_of("sample-3-5")).tokens.sample_id == "sample-3-5"


def test_an_unfinished_dump_is_finished_before_families_are_added(tmp_path):
    writer = CacheWriter.open(tmp_path, make_identity(), ("response",))
    writer.write_part(0, make_part(0, families=("response",)))
    writer = CacheWriter.open(tmp_path, make_identity(), FAMILIES)
    assert (writer.segment.number, writer.segment.families) == (0, ("response",))
    assert add_families(tmp_path, FAMILIES).segment.number == 0
    assert add_families(tmp_path, FAMILIES).segment.number == 1
    assert add_families(tmp_path, FAMILIES).segment.number == 0  # nothing is left to do
    assert len(read_segments(LocalFolder(tmp_path))) == 2


def test_an_engine_may_change_between_dumps_but_not_within_one(tmp_path):
    write_cache(tmp_path, families=("response",))
    CacheWriter.open(tmp_path, make_identity(engine="none 1"), ("response", "visual"))
    with pytest.raises(IdentityError, match="engine: cache has 'none 1', this run has 'none 2'"):
        CacheWriter.open(tmp_path, make_identity(engine="none 2"), ("response", "visual"))
    with pytest.raises(IdentityError, match="dtype: cache has 'float32', this run has 'bfloat16'"):
        CacheWriter.open(tmp_path, make_identity(dtype="bfloat16"), FAMILIES)


def spoil(part, **changes):
    return dataclasses.replace(part, tokens=[dataclasses.replace(part.tokens[0], **changes), *part.tokens[1:]])


def test_added_families_must_be_of_the_tokens_that_are_there(tmp_path):
    write_cache(tmp_path, families=("response",))
    writer = CacheWriter.open(tmp_path, make_identity(), ("visual",))
    good = make_part(0, families=("visual",))
    other_ids = good.tokens[0].token_ids.copy()
    other_ids[-1] += 1
    before = read_files(tmp_path)
    with pytest.raises(CacheError, match=r"part 0, sample 'sample-0-0': its token_ids differ from those of segment 0"):
        writer.write_part(0, spoil(good, token_ids=other_ids))
    with pytest.raises(CacheError, match="sample 'sample-0-0': its response_starts"):
        writer.write_part(0, spoil(good, response_mask=np.zeros(len(other_ids), bool)))
    images = tuple(dataclasses.replace(image, key="0" * 64) for image in good.tokens[0].images)
    other = spoil(good, images=images)
    assert other.visual is not None
    other = dataclasses.replace(other, visual={**other.visual, "0" * 64: other.visual[good.tokens[0].images[0].key]})
    with pytest.raises(CacheError, match="sample 'sample-0-0': its image_keys"):
        writer.write_part(0, other)
    absent = dataclasses.replace(good, tokens=good.tokens[:-1], errors=[SampleError("sample-0-5", "out of memory")])
    used = {image.key for record in absent.tokens for image in record.images}
    absent = dataclasses.replace(absent, visual={key: rows for key, rows in (good.visual or {}).items() if key in used})
    with pytest.raises(CacheError, match=r"sample 'sample-0-5': is in the cache, but .* no record of it: out of mem"):
        writer.write_part(0, absent)
    assert read_files(tmp_path) == before


def test_records_in_another_order_and_of_samples_that_the_cache_lacks_are_put_right(tmp_path):
    write_cache(tmp_path / "a", families=("visual",))
    write_cache(tmp_path / "b", families=("visual",), num_samples=4)  # the others were errors, say
    for folder, num_samples in (("a", 6), ("b", 4)):
        writer = CacheWriter.open(tmp_path / folder, make_identity(), ("response", "relation"))
        for part in range(2):
            records = make_part(part, families=("response", "relation"))
            assert records.response is not None
            shuffled = dataclasses.replace(records, tokens=records.tokens[::-1], response=records.response[::-1])
            writer.write_part(part, shuffled)
        writer.seal()
        assert verify(tmp_path / folder).problems == []
        cache = Cache.open(tmp_path / folder)
        assert cache.num_samples == 2 * num_samples
        expected = make_part(1, families=("response",)).response
        assert expected is not None
        for sample in range(num_samples):
            got = cache.read(cache.index_of(f"sample-1-{sample}")).response
            assert got is not None
            np.testing.assert_array_equal(got.ids, expected[sample].ids)


def test_sealing_a_segment_sweeps_its_own_orphans_and_no_others(tmp_path):
    write_cache(tmp_path, families=("response",))
    writer = CacheWriter.open(tmp_path, make_identity(), FAMILIES)
    (tmp_path / "hidden").mkdir()
    own = ["visual/part-00001.0123456789ab.parquet", "commits/0001/part-00000.json.tmp-1-a", "cache.json.tmp-1-a"]
    others = ["visual/part-00002.0123456789ab.parquet", "response/part-00000.0123456789ab.parquet.tmp-1-a"]
    for name in (*own, *others):
        (tmp_path / name).write_bytes(b"?")
    for part in range(2):
        writer.write_part(part, make_part(part, families=("visual", "relation")))
    writer.seal()
    assert not any((tmp_path / name).exists() for name in own)
    assert all((tmp_path / name).exists() for name in others)


def damage(document):
    return document.replace(b'"first_part": 2', b'"first_part": 1')


def test_damaged_segment_documents_are_named(tmp_path):
    write_cache(tmp_path)
    append_samples(tmp_path)
    append_samples(tmp_path, first=5, plan_fingerprint="g" * 8)
    good = {name: tmp_path / f"segments/{name}.json" for name in ("0001", "0002")}
    content = {name: path.read_bytes() for name, path in good.items()}
    for name, path in good.items():
        path.write_bytes(damage(content[name]).replace(b"tiny", b"tony"))
        assert "sha256" in verify(tmp_path).problems[0]
        with pytest.raises(CorruptPartError, match=f"{name}.json"):
            Cache.open(tmp_path)
        path.write_bytes(content[name])
    good["0001"].write_bytes(content["0002"])
    with pytest.raises(CorruptPartError, match=r"0001\.json: is segment 2"):
        Cache.open(tmp_path)
    good["0001"].unlink()
    with pytest.raises(CorruptPartError, match=r"0001\.json: is missing, but segment 2 is there"):
        Cache.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_part": 1}, "begins at part 1, the segments before it end at 2"),
        ({"adds_to": 0}, "adds to segment 0, which has no such parts"),
        ({"adds_to": 5}, "adds to segment 5"),
        ({"cache_sha256": "0" * 64}, "of another cache"),
        ({"families": ("response", "response")}, "families are"),
        ({"families": ("horoscope",)}, "families are"),
        ({"adds_to": 0, "first_part": 0, "identity": make_identity(), "families": ("visual",)}, "adds visual, which"),
        ({"identity": make_identity(vocab_size=7, **NEW_PLAN)}, "vocab_size: cache has 300, this run has 7"),
    ],
)
def test_a_segment_that_contradicts_the_cache_is_refused_under_a_right_hash(tmp_path, changes, message):
    write_cache(tmp_path)
    folder = LocalFolder(tmp_path)
    found, _ = find_segment(folder, make_identity(**NEW_PLAN), FAMILIES, append=True)
    assert isinstance(found, NewSegment)
    forged = found.document.model_copy(update=changes)
    folder.make_folders(["segments"])
    folder.write("segments/0001.json", forged.to_bytes())
    with pytest.raises(CorruptPartError, match=message):
        Cache.open(tmp_path)
    assert any(message in problem for problem in verify(tmp_path).problems)


def test_flipped_bytes_of_added_segments_are_found(tmp_path):
    write_cache(tmp_path, families=("response",), num_samples=2)
    writer = CacheWriter.open(tmp_path, make_identity(), ("visual",))
    for part in range(2):
        writer.write_part(part, make_part(part, families=("visual",), num_samples=2))
    writer.seal()
    names = ["segments/0001.json", "commits/0001/part-00001.json", "manifest-0001.json"]
    names += [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "visual").iterdir()]
    rng = np.random.default_rng(0)
    for name in names:
        content = (tmp_path / name).read_bytes()
        for position in rng.integers(0, len(content), 20):
            flipped = bytearray(content)
            flipped[position] ^= int(rng.integers(1, 256))
            (tmp_path / name).write_bytes(flipped)
            assert verify(tmp_path).problems, (name, position)
        (tmp_path / name).write_bytes(content)
    assert verify(tmp_path).ok


def test_of_two_appends_of_the_same_samples_the_later_is_refused(tmp_path):
    folder = tmp_path / "cache"
    write_cache(folder)
    identities = [make_identity(num_parts=1, plan_fingerprint=digit * 8) for digit in "12"]
    one, other = (CacheWriter.open(folder, identity, FAMILIES, append=True) for identity in identities)
    one.write_part(0, make_part(7))
    one.seal()
    with pytest.raises(CacheError, match="sample-7-0"):
        other.write_part(0, make_part(7))
    assert Cache.open(folder).index_of("sample-7-0") >= 0
