"""Whole caches of the families relation, sequence, hidden and images: written, read, verified."""

import contextlib
import dataclasses
import hashlib
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.backends.folder import LocalFolder
from storage.encoding.hidden_states import encode_hidden
from storage.errors import CacheError, CorruptPartError
from storage.layout import commits as layout
from storage.layout.documents import Commit, ErrorSummary, Manifest, parse_document
from storage.layout.segments import read_segments
from storage.reader.cache import Cache
from storage.records.records import RelationFactor, SequenceLogprob
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.storage.damage import flip_bytes, list_all_files, read_everything, set_plain_id, set_value
from tests.storage.family_cache import (
    FAMILIES,
    WIDTH,
    make_family_identity,
    make_family_part,
    make_image_file,
    make_output_head,
    write_family_cache,
)
from tests.storage.synthetic_cache import make_identity
from tests.storage.synthetic_cache import write_cache as write_plain_cache

MANIFEST_FILE = "manifest.json"
FLIPS_PER_FILE = 25


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("families")
    write_family_cache(path)
    return path


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "cache")


def read_manifest_document(folder):
    return parse_document((folder / MANIFEST_FILE).read_bytes(), Manifest, "manifest")


def find_commit_file(folder, part=0):
    return folder / "commits" / f"part-{part:05d}.json"


def test_what_is_read_is_what_was_written(good):
    cache = Cache.open(good)
    assert cache.families == ("tokens", *FAMILIES)
    head, original = cache.head(), make_output_head()
    for part in range(2):
        records = make_family_part(part)
        assert records.hidden
        assert records.sequence
        assert records.relation
        for row, tokens in enumerate(records.tokens):
            index = cache.index_of(tokens.sample_id)
            got = cache.read(index)
            assert got.hidden is not None
            np.testing.assert_allclose(got.hidden, records.hidden[row], rtol=2**-10, atol=1e-6)
            expected = original.logits(records.hidden[row])
            np.testing.assert_allclose(head.logits(got.hidden), expected, atol=0.01)
            assert head.logits(got.hidden).shape == (tokens.num_response_tokens, 300)
            assert got.sequence == records.sequence[row]
            for image in tokens.images:
                matrix = got.relation[image.key]
                assert isinstance(matrix, RelationFactor) == ("-0.png" in image.path)  # the others have full rank
                values = records.relation[image.key].values
                assert (values * matrix.values).sum() >= 1 - 1e-3 - 1e-6
                assert cache.image_bytes(index, image.sha256) == make_image_file(part, int(image.path[2]))


def test_images_are_stored_once_a_part(good):
    rows = [pq.read_metadata(path).num_rows for path in sorted((good / "images").iterdir())]
    assert rows == [2, 2]
    metadata = pq.read_metadata(next((good / "images").iterdir()))
    codecs = {
        metadata.row_group(0).column(at).path_in_schema: metadata.row_group(0).column(at).compression for at in range(3)
    }
    assert codecs == {"sha256": "ZSTD", "num_bytes": "ZSTD", "payload": "UNCOMPRESSED"}


def test_pairs_join_their_two_samples(good):
    cache = Cache.open(good, families=("sequence",))
    pairs = cache.pairs()
    assert [pair.pair_id for pair in pairs] == ["0-pair", "1-pair"]
    chosen, rejected = (cache.read(at).sequence for at in (pairs[1].chosen, pairs[1].rejected))
    assert (chosen, rejected) == (SequenceLogprob(-3.0, 2), SequenceLogprob(-4.5, 3))


@pytest.mark.parametrize("family", [*FAMILIES, "head"])
def test_only_what_is_asked_for_is_opened(folder, family):
    for path in (folder / family).iterdir():
        path.write_bytes(b"broken")
    others = tuple(name for name in FAMILIES if name != family)
    cache = Cache.open(folder, families=others)
    index = cache.index_of("0-shared")
    record = cache.read(index)
    assert (record.hidden is None) == (family == "hidden")
    assert (record.sequence is None) == (family == "sequence")
    assert bool(record.relation) == (family != "relation")
    if family == "head":
        with pytest.raises(CorruptPartError, match=r"head\..*has 6 bytes"):
            cache.head()
    else:
        assert cache.head().width == WIDTH
    if family == "images":
        with pytest.raises(CorruptPartError):
            cache.image_bytes(index, record.tokens.images[0].sha256)
    elif family in ("hidden", "relation", "sequence"):
        with pytest.raises(CorruptPartError):
            Cache.open(folder, families=(family,)).read(index)


def test_an_image_opens_only_its_own_part(folder):
    next((folder / "images").glob("part-00001*")).unlink()
    cache = Cache.open(folder)
    index = cache.index_of("0-shared")
    sha256 = cache.read(index).tokens.images[0].sha256
    assert cache.image_bytes(index, sha256) == make_image_file(0, 0)
    with pytest.raises(KeyError):
        cache.image_bytes(index, "0" * 64)


def test_a_cache_without_these_families_says_so(tmp_path):
    write_plain_cache(tmp_path, families=())
    cache = Cache.open(tmp_path)
    with pytest.raises(CacheError, match="no output head; dump the family hidden"):
        cache.head()
    with pytest.raises(CacheError, match="no images; dump the family images"):
        cache.image_bytes(0, "0" * 64)
    assert cache.pairs() == []


def test_an_open_cache_survives_pickling_and_holds_no_head(good):
    cache = Cache.open(good)
    cache.head()
    copy = pickle.dumps(cache)
    assert len(copy) < 100_000
    assert pickle.loads(copy).head().width == WIDTH


def test_the_manifest_states_what_encodings_cost(good):
    errors = read_manifest_document(good).errors_by_family
    assert errors is not None
    assert set(errors) == {"relation", "hidden"}
    parts = [make_family_part(part) for part in range(2)]
    cache = Cache.open(good)
    rows, matrices = [], []
    for part in parts:
        assert part.hidden
        assert part.relation
        for tokens, states in zip(part.tokens, part.hidden, strict=True):
            got = cache.read(cache.index_of(tokens.sample_id))
            assert got.hidden is not None
            rows += list(np.linalg.norm(got.hidden - states, axis=1) / np.linalg.norm(states, axis=1))
            for image in tokens.images:
                matrices.append(
                    (image.key, 1 - (part.relation[image.key].values * got.relation[image.key].values).sum())
                )
    matrices = list(dict(matrices).values())
    for family, exact in (("hidden", rows), ("relation", matrices)):
        assert errors[family].count == len(exact)
        assert errors[family].mean == pytest.approx(np.mean(exact), rel=0.01, abs=1e-6)
        assert errors[family].max == pytest.approx(max(exact), rel=0.01, abs=1e-6)
    assert errors["relation"].measure == "cosine_error"
    assert cache.statistics()["errors_by_family"]["hidden"]["max"] == errors["hidden"].max


def test_a_good_cache_verifies_and_counts_its_head(good):
    report = verify(good)
    assert report.problems == []
    assert report.notes == []
    head_bytes = sum(path.stat().st_size for path in (good / "head").iterdir())
    assert read_manifest_document(good).bytes_by_family["head"] == head_bytes > 0
    assert report.num_bytes == Cache.open(good).statistics()["bytes"]
    assert Cache.open(good).statistics()["bytes_by_family"]["head"] == head_bytes


@pytest.mark.parametrize(
    "selection",
    [
        {"relation": {"encoding": "triangle_int8"}, "hidden": {"encoding": "int8"}},
        {"relation": {"encoding": "pooled", "pool": 2}},
        {"relation": {"encoding": "low_rank", "factor_dtype": "int8", "max_cosine_error": 0.1}},
    ],
)
def test_every_encoding_makes_a_cache_that_verifies(tmp_path, selection):
    write_family_cache(tmp_path, **selection)
    assert verify(tmp_path).problems == []
    record = Cache.open(tmp_path).read(1)
    assert all(matrix.num_visual_tokens == 9 for matrix in record.relation.values())


def test_any_flipped_byte_is_found_and_no_reader_dies_of_it(tmp_path):
    write_family_cache(tmp_path, num_parts=1)
    files = list_all_files(tmp_path)
    assert len(files) == 3 + 1 + 1 + len(FAMILIES)  # cache, commit, manifest; head; tokens; families
    for damage in flip_bytes(files, FLIPS_PER_FILE):
        assert verify(tmp_path).problems, damage
        with contextlib.suppress(CacheError):
            read_everything(tmp_path)
    assert verify(tmp_path).ok


@pytest.fixture
def writer(tmp_path):
    writer = CacheWriter.open(tmp_path / "cache", make_family_identity(num_parts=1), FAMILIES)
    writer.put_head(make_output_head())
    return writer


def replaced(row, values, value):
    return [*values[:row], value, *values[row + 1 :]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"hidden": None}, "hidden: the records and the cache must either both"),
        (lambda r: {"sequence": None}, "sequence: the records and the cache must either both"),
        (lambda r: {"images": None}, "images: the records and the cache must either both"),
        (lambda r: {"hidden": r.hidden[:-1]}, "4 hidden states for 5 samples"),
        (lambda r: {"hidden": replaced(0, r.hidden, r.hidden[2])}, r"hidden states \(3, 12\) for 2 response"),
        (lambda r: {"hidden": replaced(0, r.hidden, r.hidden[0][:, :5])}, "width 5, the head needs 12"),
        (lambda r: {"hidden": replaced(0, r.hidden, r.hidden[0] * np.nan)}, "must be finite"),
        (lambda r: {"hidden": replaced(0, r.hidden, r.hidden[0] * 1e9)}, "beyond float16"),
        (lambda r: {"sequence": r.sequence[:-1]}, "4 sequence logprobs for 5 samples"),
        (lambda r: {"sequence": replaced(0, r.sequence, SequenceLogprob(-1.0, 9))}, "over 9 tokens for 2"),
        (lambda r: {"sequence": replaced(0, r.sequence, SequenceLogprob(1.0, 2))}, "expected at most 0"),
        (
            lambda r: {name: getattr(r, name)[:-1] for name in ("tokens", "hidden", "sequence")},
            "holds no 0-pair#rejected",
        ),
        (lambda r: {"images": dict(list(r.images.items())[:1])}, "1 files are missing, 0 are unknown"),
        (lambda r: {"images": {**r.images, "0" * 64: b""}}, "0 files are missing, 1 are unknown"),
        (lambda r: {"images": dict.fromkeys(r.images, b"other")}, "have another hash"),
    ],
)
def test_inconsistent_records_are_refused_and_leave_nothing_committed(writer, change, message):
    records = make_family_part(0)
    with pytest.raises(ValueError, match=message):
        writer.write_part(0, dataclasses.replace(records, **change(records)))
    assert writer.committed_parts() == set()
    writer.write_part(0, records)
    assert writer.committed_parts() == {0}


def test_hidden_states_need_the_head_first(tmp_path):
    writer = CacheWriter.open(tmp_path, make_family_identity(num_parts=1), FAMILIES)
    with pytest.raises(ValueError, match="call put_head first"):
        writer.write_part(0, make_family_part(0))


def test_a_head_that_does_not_fit_is_refused(writer, tmp_path):
    with pytest.raises(ValueError, match=r"the output head has 299 tokens .*; expected 300 tokens"):
        writer.put_head(dataclasses.replace(make_output_head(), weight=make_output_head().weight[:-1], bias=None))
    plain = CacheWriter.open(tmp_path / "plain", make_identity(num_parts=1), ())
    with pytest.raises(ValueError, match="and the family hidden"):
        plain.put_head(make_output_head())


def test_a_second_writer_adds_no_second_head(writer, tmp_path):
    before = list_all_files(tmp_path)
    again = CacheWriter.open(tmp_path / "cache", make_family_identity(num_parts=1), FAMILIES)
    again.put_head(make_output_head())
    assert list_all_files(tmp_path) == before


def test_a_damaged_head_is_written_again(writer, tmp_path):
    (place,) = list_all_files(tmp_path / "cache" / "head")
    content = place.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        place.write_bytes(damaged)
        writer.put_head(make_output_head())
        assert place.read_bytes() == content


def test_parts_of_different_heads_are_not_sealed(tmp_path):
    writers = [CacheWriter.open(tmp_path, make_family_identity(), FAMILIES) for _ in range(2)]
    for part, writer in enumerate(writers):  # both before there is a commit that names one
        writer.put_head(make_output_head(seed=part))
    for part, writer in enumerate(writers):
        writer.write_part(part, make_family_part(part))
    with pytest.raises(CacheError, match="parts 0, 1 name different output heads"):
        writers[0].seal()
    assert any("different output heads" in problem for problem in verify(tmp_path).problems)


def test_another_head_than_that_of_the_parts_is_refused_at_once(writer, tmp_path):
    writer.write_part(0, make_family_part(0))
    before = list_all_files(tmp_path)
    with pytest.raises(CacheError, match=r"with the output head head/.*, this teacher's is head/"):
        CacheWriter.open(tmp_path / "cache", make_family_identity(num_parts=1), FAMILIES).put_head(
            make_output_head(seed=9)
        )
    assert list_all_files(tmp_path) == before


def test_sealing_removes_heads_that_no_part_names(writer, tmp_path):
    folder = tmp_path / "cache"
    (ours,) = list_all_files(folder / "head")
    CacheWriter.open(folder, make_family_identity(num_parts=1), FAMILIES).put_head(make_output_head(seed=9))
    writer.write_part(0, make_family_part(0))
    left = folder / "head" / "head.0123.safetensors.tmp-1-ab"
    left.touch()
    assert len(list_all_files(folder / "head")) == 3
    writer.seal()
    assert list_all_files(folder / "head") == [ours]
    assert verify(folder).ok


def reseal(folder, *, parts=(0,), **changes):
    """Change commits and make every hash right again."""
    for part in parts:
        place = find_commit_file(folder, part)
        commit = parse_document(place.read_bytes(), Commit, "commit")
        place.write_bytes(commit.model_copy(update=changes).to_bytes())
    local = LocalFolder(folder)
    segment = read_segments(local)[0]
    commits = layout.read_commits(local, segment, range(2))
    (folder / MANIFEST_FILE).write_bytes(layout.make_manifest(segment, commits).to_bytes())


def forge(folder, family, change, *, part=0):
    """Change columns of a part's file, and make every hash right again."""
    commit = parse_document(find_commit_file(folder, part).read_bytes(), Commit, "commit")
    path = folder / commit.families[family].file
    table = pq.read_table(path)
    columns = change({name: table[name].to_pylist() for name in table.column_names})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=table.schema), sink)
    path.unlink()
    content = sink.getvalue().to_pybytes()
    sha256 = hashlib.sha256(content).hexdigest()
    entry = commit.families[family].model_copy(
        update={
            "file": layout.part_file(family, part, sha256), "sha256": sha256, "file_bytes": len(content),
            "rows": len(columns[table.column_names[0]]),
        }
    )  # fmt: skip
    (folder / entry.file).write_bytes(content)
    reseal(folder, parts=(part,), families={**commit.families, family: entry})


def first_rows(count):
    return lambda columns: {name: values[:count] for name, values in columns.items()}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("tokens", set_plain_id(4, "0-pair"), "holds no 0-pair#rejected"),
        ("tokens", set_value("sample_id", 4, "0-pair#x"), "sample '0-pair#x' has the key of '0-pair#rejected'"),
        ("tokens", set_value("half", 0, "chosen"), "sample '0-text' has the key of '0-text#chosen'"),
        ("tokens", set_value("half", 0, "best"), "half of sample '0-text' is 'best'"),
        ("tokens", set_value("copy", 0, 1), "sample '0-text' has the key of '0-text~2'"),
        ("tokens", set_value("source", 0, -1), "of source -1, expected 0 to"),
        ("tokens", set_value("source", 4, 1), "holds no 0-pair#rejected"),
        ("tokens", set_value("token_ids", 4, lambda ids: [2, *ids[1:]]), "its prompt or images differ"),
        ("sequence", set_value("sample_id", 1, "other"), "sequence row 1: is not of sample"),
        ("sequence", set_value("num_tokens", 0, 5), "over 5 tokens for 2"),
        ("sequence", set_value("logprob", 0, float("nan")), "logprob is nan"),
        ("sequence", first_rows(3), "sequence: 3 rows for 5 samples"),
        ("hidden", set_value("sample_id", 2, "other"), "hidden row 2: is not of sample"),
        ("hidden", set_value("num_rows", 0, 3), "its columns say (3, 12)"),
        ("hidden", set_value("width", 0, 13), "its columns say (2, 13)"),
        ("hidden", set_value("payload", 0, lambda payload: payload[:-1]), "(2, 12) needs"),
        ("hidden", set_value("relative_error", 0, [0.0]), "and 1 errors"),
        ("hidden", set_value("relative_error", 0, [0.0, float("nan")]), "hidden row 0"),
        ("hidden", set_value("relative_error", 0, [0.5, 0.5]), "its encodings' errors are"),
        ("hidden", set_value("payload", 0, encode_hidden(np.ones((2, 12), np.float32), "int8")), "encoding, float16"),
        ("images", set_value("payload", 0, b"other"), "has 5 bytes with the sha256"),
        ("images", set_value("num_bytes", 0, 5), "has 300 bytes with the sha256"),
        ("images", set_value("sha256", 0, "0" * 64), "is of no sample"),
        ("images", first_rows(1), "1 images have no file"),
        ("relation", set_value("payload", 0, lambda payload: payload[:12] + b"\0\0\0?" + payload[16:]), "errors are"),
        ("relation", set_value("payload", 0, lambda payload: b"\x02\0\0\0\x09" + b"\0" * 11 + b"\0" * 90), "norm"),
        ("relation", set_value("payload", 0, lambda payload: b"\x02\x02\0\0\x08" + payload[5:]), "relation row 0"),
    ],
)
def test_forged_content_under_right_hashes_is_found(folder, family, change, message):
    forge(folder, family, change)
    problems = verify(folder).problems
    assert any(message in problem for problem in problems), problems


def test_relation_payloads_of_another_encoding_are_found(tmp_path):
    write_family_cache(tmp_path / "a", relation={"encoding": "pooled"})
    write_family_cache(tmp_path / "b", relation={"encoding": "triangle_fp16"})
    source = next((tmp_path / "a" / "relation").glob("part-00000*"))
    table = pq.read_table(source)
    forge(tmp_path / "b", "relation", lambda _: {name: table[name].to_pylist() for name in table.column_names})
    assert any("the cache's encoding is 'triangle_fp16'" in problem for problem in verify(tmp_path / "b").problems)
    cache = Cache.open(tmp_path / "b")
    with pytest.raises(CorruptPartError, match="the cache's encoding is 'triangle_fp16'"):
        cache.read(cache.index_of("0-shared"))


def test_a_commit_without_its_head_or_with_one_elsewhere_is_refused(folder):
    commit = parse_document(find_commit_file(folder).read_bytes(), Commit, "commit")
    assert commit.head is not None
    elsewhere = commit.head.model_copy(update={"file": "../head.safetensors"})
    for head, message in ((None, "must name an output head"), (elsewhere, "expected a file of head/")):
        with pytest.raises(CorruptPartError, match=message):
            reseal(folder, head=head)


def test_a_head_of_other_content_under_a_right_hash_is_found(folder):
    commit = parse_document(find_commit_file(folder).read_bytes(), Commit, "commit")
    assert commit.head is not None
    place = folder / commit.head.file
    for content in (b"no head", b""):
        sha256 = hashlib.sha256(content).hexdigest()
        entry = commit.head.model_copy(
            update={"file": layout.head_file(sha256), "sha256": sha256, "file_bytes": len(content)}
        )
        (folder / entry.file).write_bytes(content)
        reseal(folder, parts=(0, 1), head=entry)
        assert any("safetensors header" in problem for problem in verify(folder).problems)
        with pytest.raises(CorruptPartError):
            Cache.open(folder).head()
    place.unlink()
    reseal(folder, parts=(0, 1), head=commit.head)
    assert any("cannot be read" in problem for problem in verify(folder).problems)


@pytest.mark.parametrize("value", [0.0, 1e6])
def test_forged_errors_of_a_commit_are_found(folder, value):
    forged = ErrorSummary(measure="x", count=2**61, mean=value, p99=value, max=value)
    reseal(folder, errors_by_family={"relation": forged, "nothing": forged})
    assert any("its encodings' errors are" in problem for problem in verify(folder).problems)


def test_commits_that_cannot_be_added_up_are_found(folder):
    huge = ErrorSummary(measure="x", count=2**62, mean=1.0, p99=1.0, max=1.0)
    for part in range(2):
        place = find_commit_file(folder, part)
        commit = parse_document(place.read_bytes(), Commit, "commit")
        place.write_bytes(commit.model_copy(update={"errors_by_family": {"relation": huge}}).to_bytes())
    assert any("cannot be added up" in problem for problem in verify(folder).problems)


def test_manifest_errors_are_compared(folder):
    manifest = read_manifest_document(folder)
    (folder / MANIFEST_FILE).write_bytes(manifest.model_copy(update={"errors_by_family": {}}).to_bytes())
    assert any("errors_by_family is {}" in problem for problem in verify(folder).problems)


def test_other_programs_read_margins_directly(good):
    duckdb = pytest.importorskip("duckdb")
    query = (
        f"with s as (select * from '{good}/tokens/*.parquet' join '{good}/sequence/*.parquet' using (sample_id)) "
        "select row_id, c.logprob - r.logprob from s c join s r using (source, row_id, copy) "
        "where c.half = 'chosen' and r.half = 'rejected' order by 1"
    )
    assert duckdb.sql(query).fetchall() == [("0-pair", 1.5), ("1-pair", 1.5)]
