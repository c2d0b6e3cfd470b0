import contextlib
import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.backends.folder import LocalFolder
from storage.encoding.distributions import ID_GROUPS_KEY, RowFormat, encode_groups
from storage.encoding.parquet_schema import encode_parquet
from storage.errors import CacheError
from storage.layout import commits as layout
from storage.layout.documents import CacheDescription, Commit, Manifest, parse_document
from storage.layout.segments import read_segments
from storage.reader.cache import Cache
from storage.records.records import PartRecords, TokensRecord
from storage.records.sample_key import SampleKey
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.storage.damage import flip_bytes, list_all_files, read_everything, set_plain_id, set_value
from tests.storage.synthetic_cache import (
    FAMILIES,
    SAMPLES_PER_PART,
    VOCAB_SIZE,
    make_identity,
    make_logits,
    make_part,
    top_k,
    write_cache,
)

FLIPS_PER_FILE = 25


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    write_cache(path)
    return path


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "cache")


def test_a_good_cache_has_no_problems(good):
    seen = []
    report = verify(good, lambda done, total: seen.append((done, total)))
    assert report.ok
    assert report.sealed
    assert report.notes == []
    assert (report.num_parts, report.num_samples, report.num_errors) == (2, 2 * SAMPLES_PER_PART, 2)
    statistics = Cache.open(good).statistics()
    assert report.num_rows == statistics["num_rows"]
    assert report.num_images == statistics["num_images"]
    assert report.num_bytes == statistics["bytes"]
    total = sum(path.stat().st_size for path in good.rglob("*.parquet"))
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_any_flipped_byte_is_found_and_no_reader_dies_of_it(tmp_path):
    folder = tmp_path / "small"
    write_cache(folder, num_samples=2)
    num_flips = 0
    for damage in flip_bytes(list_all_files(folder), FLIPS_PER_FILE):
        assert verify(folder).problems, damage
        with contextlib.suppress(CacheError):
            read_everything(folder)
        num_flips += 1
    assert num_flips == 12 * FLIPS_PER_FILE
    assert verify(folder).ok


def test_cut_lengthened_emptied_and_missing_files_are_found(folder):
    for path in list_all_files(folder):
        content = path.read_bytes()
        for damaged in (content[:-1], content[: len(content) // 2], content + b"\n", b""):
            path.write_bytes(damaged)
            assert verify(folder).problems, path
        path.unlink()
        assert verify(folder).problems, path
        path.write_bytes(content)
    assert verify(folder).ok


def test_swapped_files_are_found(folder):
    for sub in ("tokens", "commits"):
        a, b = sorted((folder / sub).iterdir())
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
        assert verify(folder).problems
        a.write_bytes(first)
        b.write_bytes(second)


def test_where_there_is_no_cache_that_is_the_problem(tmp_path):
    assert "no cache is here" in verify(tmp_path).problems[0]
    assert "cannot be opened" in verify("nowhere://bucket/x").problems[0]


def test_an_unsealed_cache_says_how_far_it_is(tmp_path):
    writer = CacheWriter.open(tmp_path, make_identity(num_parts=2), FAMILIES)
    writer.write_part(0, make_part(0))
    report = verify(tmp_path)
    assert not report.sealed
    assert len(report.problems) == 1
    assert "1 of 2 parts are committed" in report.problems[0]


def reseal(folder, part, family, content):
    """Put other bytes into a part as a forger would, with every hash right."""
    sha256 = hashlib.sha256(content).hexdigest()
    local = LocalFolder(folder)
    segment = read_segments(local)[0]
    place = folder / layout.commit_file(segment, part)
    commit = parse_document(place.read_bytes(), Commit, "commit")
    entry = commit.families[family].model_copy(
        update={"file": layout.part_file(family, part, sha256), "sha256": sha256, "file_bytes": len(content)}
    )
    (folder / entry.file).write_bytes(content)
    place.write_bytes(commit.model_copy(update={"families": {**commit.families, family: entry}}).to_bytes())
    commits = layout.read_commits(local, segment, range(2))
    (folder / segment.manifest_file).write_bytes(layout.make_manifest(segment, commits).to_bytes())


def forge(folder, family, change):
    """Change columns of a part's first family file and make every hash right again."""
    path = next((folder / family).glob("part-00000*"))
    table = pq.read_table(path)
    columns = change({name: table[name].to_pylist() for name in table.column_names})
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(pa.table(columns, schema=table.schema))
        if groups := pq.read_metadata(path).metadata.get(ID_GROUPS_KEY.encode()):
            writer.add_key_value_metadata({ID_GROUPS_KEY: groups.decode()})
    path.unlink()
    reseal(folder, 0, family, sink.getvalue().to_pybytes())


def swap_ids(columns):
    first, second, *others = columns["sample_id"]
    return {**columns, "sample_id": [second, first, *others]}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("tokens", set_plain_id(1, "sample-1-0"), "'sample-1-0' is in part 0 too"),
        ("tokens", set_plain_id(1, "broken-0"), "'broken-0' is in part 0 too"),
        ("tokens", set_plain_id(1, "other"), "response row 1: is not of sample 'other'"),
        ("tokens", set_value("image_paths", 0, ["../../etc/passwd"]), "must stay inside its image root"),
        ("tokens", set_value("image_paths", 0, ["/etc/passwd"]), "must be relative"),
        ("tokens", set_value("image_paths", 0, ["a.png", "b.png"]), "tokens row 0"),
        ("tokens", set_value("image_keys", 0, ["0" * 64]), "visual: 1 images have no rows"),
        (
            "tokens",
            set_value("token_ids", 0, lambda ids: [ids[0], ids[1], 300, *ids[3:]]),
            "tokens row 0: a token id is outside 0..299",
        ),
        ("tokens", set_value("token_ids", 0, lambda ids: ids[:-1]), "not ascending within"),
        ("tokens", set_value("num_tokens", 0, 3), "num_tokens is not"),
        ("tokens", set_value("num_response_tokens", 0, 3), "num_response_tokens is not"),
        ("tokens", set_value("response_starts", 0, [-2, 5]), "not ascending within"),
        ("tokens", set_value("response_stops", 0, [2**31 - 1, 8]), "not ascending within"),
        ("tokens", set_value("response_starts", 0, [2]), "as many response spans must start as stop"),
        ("response", swap_ids, "response row 0: is not of sample"),
        ("response", set_value("tail_mass", 0, lambda tails: [1.5, *tails[1:]]), "tail mass is outside"),
        ("response", set_value("entropy", 0, lambda values: [float("nan"), *values[1:]]), "entropy"),
        ("response", set_value("label_logprob", 0, lambda values: values[1:]), "label_logprob has other lengths"),
        ("response", set_value("block", 0, lambda block: block[:-1]), "its header needs"),
        ("response", set_value("block", 0, b""), "shorter than its header"),
        ("response", set_value("block", 1, b"x"), "more than one block"),
        ("visual", set_value("image_key", 0, "0" * 64), "is of no sample"),
        ("visual", lambda columns: {**columns, "image_key": [columns["image_key"][1]] * 4}, "appears twice"),
        ("relation", set_value("num_rows", 0, 9), "its column says otherwise"),
        ("relation", set_value("norm", 0, float("inf")), "not a finite number"),
        ("relation", set_value("payload", 0, lambda payload: payload + b"\0"), "n = 4 needs"),
    ],
)
def test_forged_content_under_right_hashes_is_found(folder, family, change, message):
    forge(folder, family, change)
    report = verify(folder)
    assert any(message in problem for problem in report.problems), report.problems
    with contextlib.suppress(CacheError):
        read_everything(folder)


def test_files_that_are_not_parquet_or_not_of_the_family_are_found(folder):
    good = next((folder / "visual").glob("part-00000*")).read_bytes()
    reseal(folder, 0, "relation", good)
    assert any("columns are" in problem for problem in verify(folder).problems)
    reseal(folder, 0, "relation", b"PAR1 this is no Parquet file PAR1")
    assert verify(folder).problems
    with pytest.raises(CacheError):
        read_everything(folder)


def test_a_commit_that_names_a_file_elsewhere_is_refused(folder, tmp_path):
    outside = tmp_path / "outside.parquet"
    source = next((folder / "tokens").glob("part-00000*"))
    outside.write_bytes(source.read_bytes())
    place = folder / "commits/part-00000.json"
    commit = parse_document(place.read_bytes(), Commit, "commit")
    for name in ("../outside.parquet", str(outside)):
        entry = commit.families["tokens"].model_copy(update={"file": name})
        place.write_bytes(commit.model_copy(update={"families": {**commit.families, "tokens": entry}}).to_bytes())
        assert any("expected its own tokens file" in problem for problem in verify(folder).problems)
        with pytest.raises(CacheError, match="expected its own tokens file"):
            Cache.open(folder)


def test_manifest_totals_are_compared(folder):
    place = folder / "manifest.json"
    manifest = parse_document(place.read_bytes(), Manifest, "manifest")
    place.write_bytes(manifest.model_copy(update={"num_samples": 1}).to_bytes())
    assert any("num_samples is 1" in problem for problem in verify(folder).problems)


def test_another_format_version_is_named_before_anything_is_parsed(folder):
    place = folder / "cache.json"
    assert json.loads(place.read_text())["format_version"] == 5
    description = parse_document(place.read_bytes(), CacheDescription, "cache.json")
    place.write_bytes(description.model_copy(update={"format_version": 99}).to_bytes())
    assert "format version is 99, this Stillhouse reads 5" in verify(folder).problems[0]


def test_sampled_weights_that_do_not_make_up_the_tail_are_found(folder):
    """Rows without their sampled entries: valid by themselves, but not under threshold selection."""
    cache = Cache.open(folder)
    records = [cache.read(index) for index in range(SAMPLES_PER_PART)]
    bare = []
    for record in records:
        rows = record.response
        assert rows is not None
        exact = rows.is_exact()
        offsets = np.cumsum([0, *rows.num_exact]).astype(np.int64)
        bare.append(dataclasses.replace(rows, offsets=offsets, ids=rows.ids[exact], logprobs=rows.logprobs[exact]))
    keys = [{"sample_id": record.tokens.sample_id} for record in records]
    encoded = encode_groups(keys, bare, RowFormat(VOCAB_SIZE, 0.0, 0.0, 0))
    content = encode_parquet("response", encoded.groups, zstd_level=1, metadata=encoded.metadata)
    next((folder / "response").glob("part-00000*")).unlink()
    reseal(folder, 0, "response", content)
    problems = verify(folder).problems
    assert any("sampled weights differ by" in problem for problem in problems), problems


def test_a_bad_row_group_behind_a_good_one_is_named_by_its_own_rows(tmp_path):
    """Row groups are checked several at once."""
    rng = np.random.default_rng(0)
    rows = top_k(make_logits(rng, 2500), VOCAB_SIZE, labels=True)  # two samples of it exceed a row group
    rows = dataclasses.replace(rows, tail_mass=np.zeros(2500, np.float32))
    ids, mask = np.full(2501, 20, np.int32), np.arange(2501) > 0
    tokens = [TokensRecord(SampleKey(f"s{number}"), "train", "", ids, mask, ()) for number in range(3)]
    writer = CacheWriter.open(tmp_path, make_identity(num_parts=2), ("response",))
    writer.write_part(0, PartRecords(tokens=tokens, response=[rows] * 3))
    writer.write_part(1, PartRecords(tokens=[], response=[]))
    writer.seal()
    assert verify(tmp_path).ok
    path = next((tmp_path / "response").glob("part-00000*"))
    file = pq.ParquetFile(path)
    assert file.metadata.num_row_groups == 3
    changed = set_value("tail_mass", 0, lambda tails: [0.5, *tails[1:]])
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, file.schema_arrow) as out:
        for number in range(3):
            table = file.read_row_group(number)
            columns = {name: table[name].to_pylist() for name in table.column_names}
            out.write_table(pa.table(changed(columns) if number == 1 else columns, schema=table.schema))
        out.add_key_value_metadata({ID_GROUPS_KEY: file.metadata.metadata[ID_GROUPS_KEY.encode()].decode()})
    path.unlink()
    reseal(tmp_path, 0, "response", sink.getvalue().to_pybytes())
    (problem,) = verify(tmp_path).problems
    assert "response: rows 1 to 1: the block's exact entries and the tail masses do not sum to 1" in problem


def test_the_dumps_own_summary_is_no_stranger(tmp_path):
    write_cache(tmp_path)
    for name in ("dump.json", "notes.txt"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert verify(tmp_path).notes == ["notes.txt: belongs to no part"]
