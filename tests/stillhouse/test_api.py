"""`import stillhouse` is enough to write, open, iterate and verify a cache, and loads nothing heavy by itself."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stillhouse

VOCAB_SIZE = 11
IMAGE_TOKEN = 3
# storage is not heavy, but a user's own storage.py would be taken for it: see stillhouse/__init__.py.
UNWANTED = {"torch", "transformers", "ray", "vllm", "pyarrow", "numpy", "matplotlib", "pydantic", "jinja2", "storage"}


def make_identity(num_parts: int) -> stillhouse.Identity:
    return stillhouse.Identity(
        teacher="made by hand",
        teacher_fingerprint="0" * 64,
        dtype="float32",
        engine="none",
        tokenizer_fingerprint=stillhouse.compute_tokenizer_fingerprint(
            {str(number): number for number in range(VOCAB_SIZE)}
        ),
        vocab_size=VOCAB_SIZE,
        chat_template_fingerprint="0" * 64,
        image_preprocessing_fingerprint="0" * 64,
        pixels=stillhouse.PixelSettings(),
        image_token_id=IMAGE_TOKEN,
        eos_token_ids=(0,),
        plan_fingerprint="0" * 64,
        num_parts=num_parts,
        image_root="images",
        selection={"response": {"method": "topk", "k": 3}, "visual": {"method": "topk", "k": 3}},
    )


def make_rows(rng: np.random.Generator, num_rows: int, *, labels: bool) -> stillhouse.SparseRows:
    """The three most probable tokens of random distributions."""
    logits = rng.normal(size=(num_rows, VOCAB_SIZE))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :3]
    top = np.take_along_axis(logprobs, ids, axis=1)
    return stillhouse.SparseRows(
        offsets=np.arange(num_rows + 1, dtype=np.int64) * 3,
        ids=ids.astype(np.int32).ravel(),
        logprobs=top.astype(np.float32).ravel(),
        num_exact=np.full(num_rows, 3, np.int32),
        tail_mass=(1 - np.exp(top).sum(axis=1)).astype(np.float32),
        entropy=-(np.exp(logprobs) * logprobs).sum(axis=1).astype(np.float32),
        log_sum_exp=np.zeros((num_rows, 0), np.float32),
        label_logprob=top[:, 0].astype(np.float32) if labels else None,
    )


def make_part(part: int, num_samples: int) -> stillhouse.PartRecords:
    rng = np.random.default_rng(part)
    tokens, visual = [], {}
    for number in range(num_samples):
        ids = np.array([1, IMAGE_TOKEN, *rng.integers(4, VOCAB_SIZE, 3)], np.int32)
        sha256 = f"{part:032x}{number:032x}"
        key = stillhouse.compute_image_key(ids[:2], [sha256], "0" * 64)
        image = stillhouse.ImageRef(f"{part}-{number}.png", sha256, num_visual_tokens=4, key=key)
        mask = np.array([False, False, False, True, True])
        tokens.append(
            stillhouse.TokensRecord(
                stillhouse.SampleKey(f"sample-{part}-{number}"), "train", "made", ids, mask, (image,)
            )
        )
        visual[key] = make_rows(rng, 4, labels=False)
    response = [make_rows(rng, 2, labels=True) for _ in tokens]
    errors = [stillhouse.SampleError(f"lost-{part}", "its image is missing")]
    return stillhouse.PartRecords(tokens=tokens, response=response, visual=visual, errors=errors)


def assert_same_rows(read: stillhouse.SparseRows, written: stillhouse.SparseRows) -> None:
    """To float32's rounding, since a reader scales exact entries so that they sum to 1 with the tail."""
    assert read.ids.tolist() == written.ids.tolist()
    for name in ("offsets", "num_exact", "logprobs", "tail_mass", "entropy"):
        np.testing.assert_allclose(getattr(read, name), getattr(written, name), rtol=1e-5, atol=1e-6)
    if written.label_logprob is not None:
        assert read.label_logprob is not None
        np.testing.assert_array_equal(read.label_logprob, written.label_logprob)


@pytest.fixture(scope="module")
def parts() -> list[stillhouse.PartRecords]:
    return [make_part(0, 70), make_part(1, 5)]  # more samples than one batch of the iteration has


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, parts: list[stillhouse.PartRecords]) -> Path:
    path = tmp_path_factory.mktemp("api") / "cache"
    writer = stillhouse.CacheWriter.open(path, make_identity(len(parts)), ("response", "visual"))
    for number, records in enumerate(parts):
        writer.write_part(number, records)
    writer.seal()
    return path


def test_a_cache_that_was_written_is_iterated_in_order(folder: Path, parts: list[stillhouse.PartRecords]) -> None:
    cache = stillhouse.open_cache(folder)
    assert isinstance(cache, stillhouse.Cache)
    samples = list(cache)
    assert [sample.tokens.sample_id for sample in samples] == cache.sample_ids
    written = {
        record.sample_id: (record, rows)
        for part in parts
        for record, rows in zip(part.tokens, part.response or (), strict=True)
    }
    visual = {key: rows for part in parts for key, rows in (part.visual or {}).items()}
    assert len(samples) == len(written) == 75
    for sample in samples:
        record, rows = written[sample.tokens.sample_id]
        assert sample.tokens.token_ids.tolist() == record.token_ids.tolist()
        assert sample.tokens.response_mask.tolist() == record.response_mask.tolist()
        assert sample.response is not None
        assert_same_rows(sample.response, rows)
        (image,) = sample.tokens.images
        assert image == record.images[0]
        assert_same_rows(sample.visual[image.key], visual[image.key])
    assert {error.sample_id for error in cache.errors} == {"lost-0", "lost-1"}


def test_samples_are_read_by_position_by_id_and_in_shuffled_batches(folder: Path) -> None:
    cache = stillhouse.open_cache(folder, families=())
    index = cache.index_of("sample-1-3")
    assert cache.read(index).tokens.sample_id == "sample-1-3"
    assert cache.read(index).response is None  # only the families that were asked for
    assert list(cache.read_many([index, 0]).sample_ids) == ["sample-1-3", cache.sample_ids[0]]
    batches = list(stillhouse.shuffled_batches(cache, batch_size=25, steps=range(3)))
    assert sorted(sample_id for batch in batches for sample_id in batch.sample_ids) == sorted(cache.sample_ids)


def test_rows_can_be_narrowed(folder: Path) -> None:
    cache = stillhouse.open_cache(folder, ("response",), narrowing={"response": stillhouse.Narrowing(k=1)})
    rows = cache.read(0).response
    assert rows is not None
    assert rows.num_exact.tolist() == [1, 1]


def test_a_scan_finds_a_damaged_file(folder: Path, parts: list[stillhouse.PartRecords], tmp_path: Path) -> None:
    report = stillhouse.verify(folder)
    assert isinstance(report, stillhouse.VerifyReport)
    assert report.ok
    assert report.num_samples == 75
    writer = stillhouse.CacheWriter.open(tmp_path, make_identity(2), ("response", "visual"))
    writer.write_part(0, parts[0])
    assert not stillhouse.verify(tmp_path).ok  # it is not sealed
    writer.write_part(1, parts[1])
    writer.seal()
    file = next((tmp_path / "response").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    assert any(file.name in problem for problem in stillhouse.verify(tmp_path).problems)


def test_errors_are_of_the_packages_own_kinds(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(stillhouse.NoCacheError):
        stillhouse.open_cache(tmp_path)
    with pytest.raises(stillhouse.MissingFamilyError, match="relation"):
        stillhouse.open_cache(folder, ("relation",))
    other = make_identity(2).model_copy(update={"vocab_size": VOCAB_SIZE + 1})
    with pytest.raises(stillhouse.IdentityError, match="vocab_size"):
        stillhouse.CacheWriter.open(folder, other, ("response", "visual"))
    kinds = [getattr(stillhouse, name) for name in stillhouse.__all__ if name.endswith("Error")]
    assert all(issubclass(kind, stillhouse.StillhouseError) for kind in kinds if kind is not stillhouse.SampleError)


def test_every_public_name_is_there_listed_and_documented() -> None:
    assert set(stillhouse.__all__) <= set(dir(stillhouse))
    for name in stillhouse.__all__:
        value = getattr(stillhouse, name)
        assert value.__name__ == name
        assert inspect.getdoc(value), name
        assert not (inspect.getdoc(value) or "").startswith(f"{name}("), name  # a dataclass's own signature


def test_an_unknown_name_is_refused_naming_the_module() -> None:
    with pytest.raises(AttributeError, match="module 'stillhouse' has no attribute 'open_cask'"):
        stillhouse.open_cask  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="open_cask"):
        from stillhouse import open_cask  # type: ignore[attr-defined]  # noqa: F401


def test_the_import_loads_nothing_heavy() -> None:
    code = "import sys, stillhouse; dir(stillhouse); print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "stillhouse" in loaded
    assert loaded & UNWANTED == set()


def test_every_package_says_that_it_is_typed() -> None:
    root = Path(stillhouse.__file__).parent.parent
    packages = ("stillhouse", "storage", "teacher_dump", "student_train")
    assert all((root / package / "py.typed").is_file() for package in packages)
