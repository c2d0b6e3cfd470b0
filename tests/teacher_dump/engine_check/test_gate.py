"""The engine check fails for every kind of wrong engine, holds for one identity, and survives being stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillhouse.__main__ import main
from storage.encoding.part_encoder import PartEncoder
from storage.errors import ConfigError, StillhouseError
from storage.writer.cache_writer import CacheWriter
from teacher_dump.dump import run_dump
from teacher_dump.engine_check.gate import (
    STATES_FOLDER,
    find_missing_check,
    get_states_path,
    measure_engine,
    plan_check,
    refuse_difference,
    require_engine_check,
    save_states,
)
from teacher_dump.engine_check.record import RECORD_FILE, EngineCheckRecord, read_record, write_record
from teacher_dump.engine_check.slice_choice import KINDS
from teacher_dump.estimates.cost_calibration import SliceTask, choose_halves, score_both_slices
from teacher_dump.execution.worker_setup import make_reference_settings, make_worker_settings
from teacher_dump.planning.dump_plan import DumpPlan, plan_dump
from teacher_dump.settings import DumpSettings, read_settings
from teacher_dump.workers.worker import Worker, open_scorer
from tests.teacher_dump.architectures import write_samples
from tests.teacher_dump.conftest import WriteConfig
from tests.teacher_dump.engine_check import engines
from tests.teacher_dump.engine_check.engines import LocalCaller

FAMILIES = ["response", "visual", "relation"]
MakeSettings = Callable[..., DumpSettings]


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 samples: text alone, one image of any size, several images, several turns."""
    return write_samples(tmp_path_factory.mktemp("mixed"), with_images=True)


@pytest.fixture
def write_engine_config(write_config: WriteConfig, mixed_data: Path) -> WriteConfig:
    """A pipeline.yaml whose engine is vLLM, which the tests' caller replaces."""

    def write(**sections: dict[str, Any]) -> Path:
        teacher = {"backend": "vllm", "max_length": 512, **sections.pop("teacher", {})}
        data = {"sources": [{"path": str(mixed_data)}], **sections.pop("data", {})}
        cache = {"families": FAMILIES, **sections.pop("cache", {})}
        return write_config(teacher=teacher, data=data, cache=cache, **sections)

    return write


def measure(settings: DumpSettings, call: LocalCaller, heard: list[str] | None = None) -> EngineCheckRecord:
    notify = (lambda line: None) if heard is None else heard.append
    return measure_engine(plan_dump(settings), settings, call=call, notify=notify)


def find_figure(record: EngineCheckRecord, family: str, measure: str, kind: str = "all") -> Any:
    return next(
        one.summary for one in record.figures if (one.family, one.summary.measure, one.kind) == (family, measure, kind)
    )


def test_an_engine_that_is_the_model_passes_and_the_figures_are_kept(write_engine_config: WriteConfig):
    settings, call = read_settings(write_engine_config()), LocalCaller()
    record = measure(settings, call)
    refuse_difference(record, plan_dump(settings), settings)
    assert call.calls == ["engine", "model"]
    assert record == read_record(settings.run / RECORD_FILE)
    assert record.refused == ()
    assert record.num_samples == {"several images": 3, "one image": 5, "text": 4}
    assert {(one.family, one.summary.measure) for one in record.figures} == {
        ("response", "kl"), ("response", "total_variation"), ("response", "label_logprob"),
        ("visual", "kl"), ("visual", "total_variation"), ("relation", "cosine_error"),
    }  # fmt: skip
    assert {one.kind for one in record.figures} == {"all", *KINDS}
    assert max(one.summary.max for one in record.figures) < 1e-9
    assert record.identity["engine"].startswith("vllm ")
    assert record.identity["model"].startswith("transformers ")
    assert record.identity["dtype"] == "float32"
    assert not (settings.run / STATES_FOLDER).exists()
    assert find_missing_check(plan_dump(settings), settings) is None
    heard: list[str] = []
    assert measure(settings, call, heard) == record
    assert call.calls == ["engine", "model"]  # not again for the same identity
    assert heard[0].startswith("engine: checked before")


@pytest.mark.parametrize(
    ("change", "family"),
    [
        (engines.shift_by_a_row, "response"),
        (engines.leave_out_the_norm, "visual"),
        (engines.subtract_the_mean, "response"),
        (engines.add_noise, "visual"),
        (engines.overflow, "response"),
    ],
)
def test_a_wrong_engine_is_refused_by_name(write_engine_config: WriteConfig, change: engines.Change, family: str):
    config = write_engine_config()
    settings = read_settings(config)
    planned = plan_dump(settings)
    record = measure(settings, LocalCaller(change))
    if change is engines.add_noise:
        assert 0.02 < find_figure(record, "response", "kl").mean < 0.09  # nats, as on Gemma 4
    with pytest.raises(StillhouseError, match=rf"{family} rows of samples with one image: KL\(model .. engine\) is "):
        refuse_difference(record, planned, settings)
    with pytest.raises(StillhouseError, match="the engine does not say what the model says"):
        require_engine_check(planned, settings)  # of a tested architecture too: it is known to be wrong here
    assert main(["dump", str(config)]) == 1
    assert not Path(settings.cache.path).exists()
    assert not (settings.run / STATES_FOLDER).exists()
    loose = read_settings(config, ["check.max_engine_kl=2e6"])
    refuse_difference(record, planned, loose)


def test_an_engine_that_is_wrong_for_several_images_alone_is_refused(write_engine_config: WriteConfig):
    settings = read_settings(write_engine_config())
    record = measure(settings, LocalCaller(engines.add_noise_to_several_images))
    with pytest.raises(StillhouseError, match="response rows of samples with several images") as raised:
        refuse_difference(record, plan_dump(settings), settings)
    assert "with one image" not in str(raised.value)
    assert "text alone" not in str(raised.value)


def test_visual_rows_count_only_where_the_dump_has_them(write_engine_config: WriteConfig):
    """An engine may be wrong about positions that nobody stores."""
    settings = read_settings(write_engine_config(cache={"families": ["response"]}))
    planned = plan_dump(settings)
    record = measure(settings, LocalCaller())
    figures = [
        one.model_copy(update={"summary": one.summary.model_copy(update={"mean": 1.0})})
        if one.family == "visual"
        else one
        for one in record.figures
    ]
    wrong = record.model_copy(update={"figures": tuple(figures)})
    refuse_difference(wrong, planned, settings)
    for family in ("visual", "relation"):
        both = replace(settings, cache=settings.cache.model_copy(update={"families": ("response", family)}))
        with pytest.raises(StillhouseError, match="visual rows of samples with several images"):
            refuse_difference(wrong, planned, both)


def test_samples_that_the_engine_refuses_are_a_failure(write_engine_config: WriteConfig):
    settings = read_settings(write_engine_config())
    record = measure(settings, LocalCaller(refuses=True))
    with pytest.raises(StillhouseError, match=r"several images: none of 3 could be compared; .* at most 1 image may"):
        refuse_difference(record, plan_dump(settings), settings)


def test_a_check_that_fails_in_the_second_process_resumes(write_engine_config: WriteConfig):
    settings = read_settings(write_engine_config())
    failing = LocalCaller(fails_in_model=StillhouseError("the teacher's process failed"))
    with pytest.raises(StillhouseError, match="the teacher's process failed"):
        measure(settings, failing)
    path = get_states_path(settings.run)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert not (settings.run / RECORD_FILE).exists()
    assert find_missing_check(plan_dump(settings), settings) is None  # `plan` need not ask the engine
    kept = path.read_bytes()

    heard: list[str] = []
    again = LocalCaller()
    measure(settings, again, heard)
    assert again.calls == ["model"]
    assert heard[0].startswith("engine: resumes from the engine's states")
    assert not path.parent.exists()

    (settings.run / RECORD_FILE).unlink()
    for content, changes in ((kept[:-5], []), (b"", []), (kept, ["teacher.dtype=bfloat16"])):
        path.parent.mkdir()
        path.write_bytes(content)
        other, fresh = read_settings(settings.run.parent.parent / "pipeline.yaml", changes), LocalCaller()
        measure(other, fresh)
        assert fresh.calls == ["engine", "model"], changes
        (settings.run / RECORD_FILE).unlink()


def test_the_check_resumes_from_the_states_that_a_forecast_leaves(write_engine_config: WriteConfig):
    """`plan` starts the engine anyway: it scores both slices there, and transformers comes after it."""
    settings = read_settings(write_engine_config())
    planned = plan_dump(settings)
    check = find_missing_check(planned, settings)
    assert check is not None
    halves = choose_halves(planned.plan.parts, 8)
    encoder = PartEncoder(planned.identity, ("tokens", *FAMILIES), settings.cache.zstd_level)
    scorer = open_scorer(make_reference_settings(make_worker_settings(planned, settings)))
    result, states = score_both_slices(scorer, (SliceTask(halves, encoder), check.task))
    assert result.whole.work.samples >= 8
    assert {one.sample_id for one in states.samples} == {sample.id for sample in check.task.samples}
    save_states(settings.run, check, states)
    assert find_missing_check(planned, settings) is None
    call = LocalCaller()
    record = measure(settings, call)
    assert call.calls == ["model"]
    refuse_difference(record, planned, settings)
    off = read_settings(settings.run.parent.parent / "pipeline.yaml", ["dump.engine_check=false"])
    assert find_missing_check(planned, off) is None


def test_a_process_that_is_killed_leaves_states_that_are_whole(write_engine_config: WriteConfig):
    settings = read_settings(write_engine_config())
    planned = plan_dump(settings)

    class Killed(LocalCaller):
        def __call__(
            self,
            planned: DumpPlan,
            settings: DumpSettings,
            function: Callable[..., Any],
            argument: Any,
            *,
            is_reference: bool = False,
        ) -> Any:
            if is_reference:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(planned, settings, function, argument, is_reference=is_reference)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:
        measure_engine(planned, settings, call=Killed(), notify=lambda line: None)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (settings.run / RECORD_FILE).exists()
    call = LocalCaller()
    measure(settings, call)  # takes the dead process's lock over
    assert call.calls == ["model"]
    assert not (settings.run / STATES_FOLDER).exists()


def test_an_image_that_changed_between_the_two_processes_is_named(write_engine_config: WriteConfig, tmp_path: Path):
    data = write_samples(tmp_path, with_images=True)
    config = write_engine_config(data={"sources": [{"path": str(data)}]})
    settings = read_settings(config)
    with pytest.raises(StillhouseError):
        measure(settings, LocalCaller(fails_in_model=StillhouseError("stopped")))
    shutil.copy(tmp_path / "square.png", tmp_path / "wide.png")
    with pytest.raises(StillhouseError, match="sample wide: its text or an image has changed since"):
        measure(settings, LocalCaller())
    assert not (settings.run / STATES_FOLDER).exists()
    assert measure(settings, LocalCaller()).refused == ()


def test_another_identity_makes_the_record_stale_by_name(write_engine_config: WriteConfig, tmp_path: Path):
    config = write_engine_config()
    record = measure(read_settings(config), LocalCaller())
    for override, line in (
        ("teacher.dtype=bfloat16", 'dtype: was "float32", is "bfloat16"'),
        ("check.engine_samples=4", "engine_samples: was 16, is 4"),
        ("teacher.settings={enforce_eager: true}", "engine_settings.enforce_eager: was null, is true"),
        ("data.background='#000000'", "pixels.background: was"),
    ):
        settings = read_settings(config, [override])
        plan = plan_check(plan_dump(settings), settings)
        assert plan.record is None
        assert any(line in one for one in plan.stale), (override, plan.stale)
    heard: list[str] = []
    call = LocalCaller()
    measure(read_settings(config, ["teacher.dtype=bfloat16"]), call, heard)
    assert call.calls == ["engine", "model"]
    assert "holds for another identity and is made again:" in heard[0]
    (settings := read_settings(config)).run.mkdir(exist_ok=True)
    write_record(settings.run / RECORD_FILE, record.model_copy(update={"num_samples": {"text": 4}}))
    stale = plan_check(plan_dump(settings), settings).stale
    assert "samples with several images: the check scored none" in stale
    other = {**record.model_dump(mode="json"), "later": 1}
    (settings.run / RECORD_FILE).write_text(json.dumps(other))
    assert plan_check(plan_dump(settings), settings).record is None  # a file of another version


def make_untested(teacher: Path, folder: Path) -> Path:
    """Copies a teacher under an architecture that nobody has tested."""
    copy = shutil.copytree(teacher, folder / "untested")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llava_of_tomorrow"}))
    return copy


def test_a_dump_of_an_untested_architecture_needs_a_passed_check(
    write_engine_config: WriteConfig, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tested = read_settings(write_engine_config())
    assert require_engine_check(plan_dump(tested), tested) is None
    record = measure(tested, LocalCaller())
    passed = require_engine_check(plan_dump(tested), tested)
    assert passed is not None
    assert (passed.state, passed.num_samples, passed.max_kl, passed.dtype) == ("passed", 12, 0.01, "float32")
    assert {family: [one.measure for one in some] for family, some in passed.families.items()} == {
        "response": ["kl", "total_variation", "label_logprob"],
        "visual": ["kl", "total_variation"],
        "relation": ["cosine_error"],
    }
    path = tested.run / RECORD_FILE
    path.unlink()

    config = write_engine_config(teacher={"model": str(make_untested(tiny_teacher, tmp_path))})
    settings = read_settings(config)
    planned = plan_dump(settings)
    assert main(["dump", str(config)]) == 2
    said = capsys.readouterr().err
    assert "a llava_of_tomorrow is untested in vLLM" in said
    assert f"there is no {path}" in said
    assert "stillhouse check --engine FILE" in said
    assert not (tmp_path / "cache").exists()

    write_record(path, record)
    with pytest.raises(ConfigError, match="holds for another identity:\n  teacher_fingerprint: was"):
        require_engine_check(planned, settings)
    off = read_settings(config, ["dump.engine_check=false"])
    without = require_engine_check(planned, off)
    assert without is not None
    assert (without.state, without.engine, without.families) == ("off", "", {})

    own = record.model_copy(update={"identity": plan_check(planned, settings).identity})
    write_record(path, own)
    entry = require_engine_check(planned, settings)
    assert entry is not None
    assert entry.state == "passed"
    kept = require_engine_check(planned, off)
    assert kept is not None
    assert (kept.state, set(kept.families)) == ("off", {"response", "visual", "relation"})
    slower = read_settings(config, ["teacher.backend=transformers"])
    assert require_engine_check(plan_dump(slower), slower) is None


def test_a_dump_that_finishes_an_interrupted_retry_heeds_the_check_too(
    write_engine_config: WriteConfig, mixed_data: Path, tmp_path: Path
):
    rows = [json.loads(line) for line in mixed_data.read_text().splitlines()]
    text = next(row for row in rows if not row["image"])
    late = next(row for row in rows if len(row["image"]) == 1) | {"id": "late", "image": ["late.png"]}
    data = tmp_path / "late.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (text, late)))
    settings = read_settings(
        write_engine_config(data={"sources": [{"path": str(data)}]}, dump={"max_error_fraction": 1.0})
    )
    planned = plan_dump(settings)
    writer = CacheWriter.open(settings.cache.path, planned.identity, settings.cache.families)
    for part in planned.plan.parts:
        Worker(make_worker_settings(planned, settings), open_engine=LocalCaller().open_engine).run(part)
    writer.seal()
    measure(settings, LocalCaller(engines.add_noise))
    assert run_dump(settings, progress=False).num_errors == 1  # nothing is left to write
    CacheWriter.begin_retry(settings.cache.path, planned.identity, 0, [["late"]])
    with pytest.raises(StillhouseError, match="the engine does not say what the model says"):
        run_dump(settings, progress=False)


def test_check_tells_figures_and_that_transformers_has_nothing_to_compare(
    write_engine_config: WriteConfig, capsys: pytest.CaptureFixture[str]
):
    config = write_engine_config()
    measure(read_settings(config), LocalCaller())
    assert main(["check", "--engine", str(config), "teacher.backend=transformers"]) == 0
    assert "engine: nothing to compare" in capsys.readouterr().out
    assert main(["check", "--engine", str(config)]) == 0  # an earlier check of this identity is told again
    said = capsys.readouterr().out
    assert "engine: checked before" in said
    assert re.search(r"^response +kl +several images +\d+ ", said, flags=re.MULTILINE)
    assert said.splitlines()[-1] == "engine: says what the model says, within 0.01 nats a row"
