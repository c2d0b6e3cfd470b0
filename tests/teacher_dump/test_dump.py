from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.backends.folder import open_folder
from storage.errors import IdentityError
from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from teacher_dump.__main__ import main
from teacher_dump.dump import DumpResult, run_dump
from teacher_dump.execution.worker_setup import list_prompt_errors, make_worker_settings
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import read_settings
from teacher_dump.workers.worker import Worker
from tests.teacher_dump.conftest import WriteConfig
from tests.tiny import CHAT_TEMPLATE, make_tiny_dataset

REPOSITORY = Path(__file__).parents[2]
TOKENS_ONLY: dict[str, Any] = {"families": []}


def test_tokens_only_needs_no_teacher_and_no_ray(write_config: WriteConfig, tiny_teacher: Path, tmp_path: Path) -> None:
    """Runs where ray and vllm cannot be imported, over a folder that holds a processor and no weights."""
    shutil.copytree(tiny_teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    config = write_config(cache=TOKENS_ONLY, teacher={"model": str(tmp_path / "bare")})
    code = (
        "import sys; sys.modules['ray'] = sys.modules['vllm'] = None\n"
        "from teacher_dump.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cache = Cache.open(tmp_path / "cache")
    assert cache.sealed
    assert cache.families == ("tokens",)
    assert cache.num_samples == 24
    assert cache.identity.teacher_fingerprint == cache.identity.engine == "none"
    assert cache.read(0).tokens.images[0].num_visual_tokens == 16
    assert verify(tmp_path / "cache").problems == []


def test_a_complete_cache_is_left_alone_and_costs_no_torch(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(cache=TOKENS_ONLY)
    first = run_dump(read_settings(config), progress=False)
    assert first.summary is not None
    assert first.summary.num_parts_written == first.num_parts == 8
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")}
    code = (
        "import sys; from teacher_dump.__main__ import main; code = main(sys.argv[1:])\n"
        "assert not {'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nothing; the cache was complete" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")} == before


def test_errors_are_counted_and_too_many_fail(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_tiny_dataset(tmp_path / "data", num_samples=20, num_images=4)["train"]
    lines = file.read_text(encoding="utf-8").splitlines()
    (tmp_path / "data/images/train-001.png").write_bytes(b"no image")  # five samples show it
    file.write_text("\n".join([*lines, lines[0], "{broken"]) + "\n", encoding="utf-8")
    config = write_config(cache=TOKENS_ONLY, data={"sources": [{"path": str(file)}]})
    settings = read_settings(config)
    foreseen = list_prompt_errors(settings, plan_dump(settings), progress=False)
    assert main([str(config)]) == 1
    said = capsys.readouterr().err
    assert "2 of 7 samples failed (28.6%; dump.max_error_fraction is 1.0%); 3 parts are left, but no more" in said
    assert "1 × duplicate id …, first seen at … that one is kept" in said
    assert "duplicate id 'train-0000'" in said
    assert not (tmp_path / "cache/manifest.json").exists()
    assert main([str(config), "dump.max_error_fraction=0.5"]) == 0
    cache = Cache.open(tmp_path / "cache")
    assert cache.sealed
    assert (cache.num_samples, len(cache.errors)) == (15, 7)
    assert sorted(error.sample_id for error in foreseen) == sorted(error.sample_id for error in cache.errors)
    summary = json.loads((tmp_path / "cache/dump.json").read_text(encoding="utf-8"))
    assert (summary["num_samples"], summary["num_errors"], summary["num_tokens"]) == (10, 5, 0)  # of the second run
    assert list(summary["error_kinds"].values()) == [5, 1, 1]
    assert next(iter(summary["error_kinds"])).startswith("image …")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.model=/nowhere/at/all"], "teacher.model: /nowhere/at/all is neither a folder"),
        (["data.sources=[{path: /nowhere.jsonl}]"], "/nowhere.jsonl"),
        (["data.sources=[]"], "data.sources: is empty"),
        (["dump.samples_per_prat=3"], "samples_per_prat"),
        (["dump.samples_per_part=0"], "samples_per_part"),
        (["teacher.backend=magic"], "magic"),
        (["dump.actors=0"], "dump.actors: got 0 (int), expected at least 1"),
        (["dump.actors=many"], "dump.actors: got 'many' (str), expected a whole number, or {min, max}"),
        (["dump.actors={max: 0}"], "dump.actors.max: got 0 (int), expected greater than or equal to 1"),
        (["dump.actors={min: 3, max: 2}"], "min is 3 and max 2; min must not be the larger"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert main([str(write_config(cache=TOKENS_ONLY)), *overrides]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert sum("dump.actors" in line for line in said.splitlines()) <= 1
    assert "Traceback" not in said


def test_another_plan_over_the_same_cache_is_refused_by_name(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(cache=TOKENS_ONLY)
    assert main([str(config)]) == 0
    assert main([str(config), "dump.samples_per_part=24"]) == 2
    said = capsys.readouterr().err
    assert "plan_fingerprint" in said
    assert "num_parts" in said
    assert main([str(config), "teacher.max_length=100"]) == 2


def test_identity_follows_what_is_dumped(write_config: WriteConfig) -> None:
    config = write_config()

    def identity(*overrides: str) -> Any:
        return plan_dump(read_settings(config, overrides)).identity

    base = identity()
    assert base.dtype == "float32"
    assert base.engine.startswith("transformers ")
    assert identity("teacher.backend=vllm").engine.startswith("vllm ")
    assert identity("teacher.dtype=bfloat16").dtype == "bfloat16"
    kept = {"temperatures": [], "rounding_kl": 1e-3}
    assert base.selection == {
        "response": {"method": "threshold", "tau": 0.01, "seed": 0, **kept},
        "visual": {"method": "threshold", "tau": 0.01, "seed": 0, **kept},
        "relation": {"centered": False, "encoding": "triangle_fp16"},
        "tokens": {"tokenisation": 2},
    }
    assert identity("cache.families=[response]", "cache.response.method=topk").selection == {
        "response": {"method": "topk", "k": 64, **kept},
        "tokens": {"tokenisation": 2},
    }
    assert len(base.teacher_fingerprint) == 64
    assert identity("cache.families=[]").teacher_fingerprint == "none"


def test_a_cache_of_another_tokenisation_or_of_other_template_arguments_is_not_continued(
    write_config: WriteConfig, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_teacher, tmp_path / "arguing")
    template = "{%- if shouting %}LOUD {% endif -%}" + CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = write_config(cache=TOKENS_ONLY, teacher={"model": str(folder)})
    settings = read_settings(config)
    planned = plan_dump(settings)
    older = planned.identity.model_copy(update={"selection": {}})  # as every dump before this version
    CacheWriter.open(tmp_path / "cache", older, ())
    for append in (False, True):
        with pytest.raises(IdentityError, match=r"tokens\.tokenisation: cache has None, this run has 2"):
            CacheWriter.open(tmp_path / "cache", planned.identity, ("response",), append=append)
    CacheWriter.open(tmp_path / "new", planned.identity, ())
    loud = plan_dump(read_settings(config, ["teacher.chat_template_arguments={shouting: true}"]))
    assert loud.identity.selection["tokens"] == {"tokenisation": 2, "chat_template_arguments": {"shouting": True}}
    with pytest.raises(IdentityError, match=r"chat_template_arguments: cache has None, this run has .*shouting"):
        CacheWriter.open(tmp_path / "new", loud.identity, ())


def test_max_length_is_never_beyond_the_models_own(write_config: WriteConfig) -> None:
    assert plan_dump(read_settings(write_config(teacher={"max_length": 4096}))).max_length == 512


def test_the_cache_knows_the_image_root(write_config: WriteConfig, tiny_data: Path) -> None:
    identity = plan_dump(read_settings(write_config(cache=TOKENS_ONLY))).identity
    assert identity.image_root == os.fspath(tiny_data.parent)


def dump_without_ray(config: Path, *overrides: str) -> DumpResult:
    """Writes all parts in this process, in place of Ray's actors; then runs the dump, which finds them written."""
    settings = read_settings(config, overrides)
    planned, cache = plan_dump(settings), settings.cache
    writer = CacheWriter.open(cache.path, planned.identity, cache.families, append=cache.append)
    own = cache.model_copy(update={"families": writer.segment.families})
    worker = Worker(make_worker_settings(planned, replace(settings, cache=own)))
    for part in planned.plan.parts:
        worker.run(part)
    return run_dump(settings, progress=False)


def test_a_later_dump_adds_only_missing_families(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config()
    path, at_once = tmp_path / "cache", tmp_path / "at once"
    run_dump(read_settings(config, ["cache.families=[]"]), progress=False)
    assert dump_without_ray(config, "cache.families=[response]").segments == (0, 1)
    before = {file: file.read_bytes() for file in path.rglob("*.*") if file.name != "dump.json"}
    assert dump_without_ray(config).segments == (0, 2)
    assert {file: file.read_bytes() for file in before} == before
    cache = Cache.open(path)
    assert cache.families == ("tokens", "response", "visual", "relation")
    assert [segment.families for segment in cache.segments] == [(), ("response",), ("visual", "relation")]
    assert cache.identity.teacher_fingerprint != "none"
    assert verify(path).problems == []
    dump_without_ray(config, f"cache.path={json.dumps(str(at_once))}")
    other = Cache.open(at_once)
    assert cache.sample_ids == other.sample_ids
    for index in range(cache.num_samples):
        one, two = cache.read(index), other.read(index)
        assert one.response is not None
        assert two.response is not None
        assert one.response.equals(two.response)
        assert all(rows.equals(two.visual[key]) for key, rows in one.visual.items())
    assert run_dump(read_settings(config), progress=False).summary is None
    with pytest.raises(IdentityError, match=r"selection\.response\.tau: cache has 0\.01, this run has 0\.2"):
        run_dump(read_settings(config, ["cache.response.tau=0.2"]), progress=False)


def test_new_samples_are_appended_with_cache_append(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = make_tiny_dataset(tmp_path / "data", num_samples=8, num_images=4, splits=("train", "test"))

    def source(*names: str) -> str:
        return "data.sources=" + json.dumps([{"path": str(files[name])} for name in names])

    config = write_config(cache=TOKENS_ONLY)
    assert main([str(config), source("train")]) == 0
    capsys.readouterr()
    assert main([str(config), source("test")]) == 2
    said = capsys.readouterr().err
    assert "cache.append: true adds the samples of another plan" in said
    assert "plan_fingerprint" in said
    before = sorted((tmp_path / "cache").rglob("*"))
    assert main([str(config), source("train", "test"), "cache.append=true"]) == 1
    assert "8 of the samples to append are in the cache already: 'train-" in capsys.readouterr().err
    assert not [path for path in sorted((tmp_path / "cache").rglob("*")) if path not in before and path.is_file()]
    assert main([str(config), source("test"), "cache.append=true"]) == 0
    assert main([str(config), source("test"), "cache.append=true"]) == 0
    assert "nothing; the cache was complete" in capsys.readouterr().out
    cache = Cache.open(tmp_path / "cache")
    assert cache.sealed
    assert [name.partition("-")[0] for name in cache.sample_ids] == ["train"] * 8 + ["test"] * 8
    assert verify(tmp_path / "cache").problems == []
    assert main([str(config), source("train")]) == 0  # still its own


def test_a_dump_into_an_object_store(write_config: WriteConfig) -> None:
    pytest.importorskip("moto.server")
    from tests.storage.s3_server import BUCKET, set_s3_environment

    with set_s3_environment():
        url = f"s3://{BUCKET}/runs/cache"
        config = write_config(cache={**TOKENS_ONLY, "path": url})
        first = run_dump(read_settings(config), progress=False)
        assert (first.cache, first.num_samples) == (url, 24)
        assert run_dump(read_settings(config), progress=False).summary is None
        assert verify(url).problems == []
        assert Cache.open(url).sealed
        assert b"num_parts_written" in open_folder(url).read("dump.json")


def test_cut_samples_are_those_of_the_shorter_conversation_and_counted(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    """Every sample has two turns and an image in the first; some are too long for the teacher."""
    file = make_tiny_dataset(tmp_path / "data", num_samples=12, num_images=4, turns=2)["train"]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    short = [{**row, "conversations": row["conversations"][:2]} for row in rows]
    (tmp_path / "data/short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short), encoding="utf-8")

    def records(name: str, rule: str, max_length: int) -> tuple[dict[str, list[Any]], DumpResult]:
        config = write_config(
            cache={"families": [], "path": str(tmp_path / f"{name}-{rule}-{max_length}")},
            data={"sources": [{"path": str(tmp_path / f"data/{name}.jsonl")}], "too_long": rule},
            teacher={"max_length": max_length},
            dump={"max_error_fraction": 0.999},
        )
        result = run_dump(read_settings(config), progress=False)
        cache = Cache.open(result.cache)
        tokens = [cache.read(number).tokens for number in range(cache.num_samples)]
        return {
            one.sample_id: [one.token_ids.tolist(), one.response_mask.tolist(), one.images] for one in tokens
        }, result

    whole, _ = records("train", "refuse", 512)
    lengths = sorted(len(ids) + 15 for ids, _, _ in whole.values())
    limit = lengths[len(lengths) // 2]
    refused, result = records("train", "refuse", limit)
    assert 0 < len(refused) < 12
    assert result.num_errors == 12 - len(refused)
    cut, result = records("train", "cut_turns", limit)
    shorter, _ = records("short", "refuse", 512)
    assert cut == {**shorter, **refused}
    assert result.summary is not None
    assert (result.summary.num_cut, result.summary.num_errors) == (12 - len(refused), 0)
    answers, _ = records("train", "cut_answer", limit)
    for name, (ids, mask, images) in answers.items():
        assert ids == whole[name][0][: len(ids)]
        assert mask[-1]
        assert len(ids) >= len(cut[name][0])
        assert images == whole[name][2]
    assert any(len(ids) + 15 == limit for name, (ids, _, _) in answers.items() if name not in refused)
