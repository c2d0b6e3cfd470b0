from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from storage.config import BudgetSection, CacheSection, Section
from storage.config_loader import NamedSections, read_sections
from storage.errors import ConfigError


class LossSection(Section):
    weight: float = Field(default=1.0, gt=0)


class StageSection(Section):
    init: str
    kind: Literal["fast", "slow"] = "fast"
    losses: LossSection | None = None
    splits: Annotated[tuple[str, ...], Field(min_length=1)] = ("train",)
    width: Annotated[int, Field(ge=1)] | BudgetSection = 1
    steps: int | None = None


class SourceSection(Section):
    path: str
    limit: int | None = None


class DataSection(Section):
    sources: tuple[SourceSection, ...] = ()
    settings: dict[str, float] = Field(default_factory=dict)


SCHEMAS = {"cache": CacheSection, "stages": NamedSections(StageSection), "data": DataSection}

TEXT = """
name: trial
runs_dir: out
cache:
  path: {run}/cache
  response: {method: topk, k: 8}
data:
  sources:
    - {path: "{run}/data/train.jsonl"}
    - {path: other.jsonl, limit: 3}
dump:
  anything: this entry point does not read
stages:
  sft:
    init: "{run}/models/start-{seed}"
  dft:
    init: x
    losses: {weight: 2e-1}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "pipeline.yaml"
    file.write_text(TEXT, encoding="utf-8")
    return file


def read(path, *overrides):
    return read_sections(path, SCHEMAS, overrides)


def test_sections_come_checked_with_the_run_folder_filled_in(path):
    sections = read(path)
    assert sections.name == "trial"
    assert sections.run == Path("out/trial")
    assert sections["cache"].path == "out/trial/cache"
    assert sections["cache"].response.k == 8
    assert sections["data"].sources[0].path == "out/trial/data/train.jsonl"
    assert sections["stages"]["sft"].init == "out/trial/models/start-{seed}"
    assert sections["stages"]["dft"].losses.weight == 0.2
    assert set(sections) == set(SCHEMAS)
    assert sections.document["dump"] == {"anything": "this entry point does not read"}


def test_missing_sections_are_made_of_defaults(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("")
    sections = read(file)
    assert sections["cache"] == CacheSection(path="runs/digits/cache")
    assert sections["stages"] == {}
    assert sections.run == Path("runs/digits")


def test_overrides_are_yaml_and_reach_everywhere(path):
    sections = read(
        path,
        "cache.response.k=16",
        "cache.families=[response]",
        "data.sources.1.limit=null",
        "data.settings={a: 1e-3, b: 2}",
        "data.settings.c=.5",
        "stages.dft.losses=null",
        "stages.sft.losses.weight=3",
        "stages.new.init={run}/x",
        "name=other",
        "stages.sft.steps=7",
        "stages.sft.steps=8",
    )
    assert sections["cache"].response.k == 16
    assert sections["cache"].families == ("response",)
    assert sections["data"].sources[1].limit is None
    assert sections["data"].settings == {"a": 1e-3, "b": 2, "c": 0.5}
    assert sections["stages"]["dft"].losses is None
    assert sections["stages"]["sft"].losses.weight == 3
    assert sections["stages"]["sft"].steps == 8
    assert sections["stages"]["new"].init == "out/other/x"


def test_overrides_reach_the_other_fields_of_a_section_that_is_a_list(path):
    sections = read(
        path,
        *("data=[{path: a}, {path: b}]", "data.1.limit=3", "data.settings.c=1"),
        *("data.sources.0.limit=4", "data.1.path=c"),
    )
    assert [(source.path, source.limit) for source in sections["data"].sources] == [("a", 4), ("c", 3)]
    assert sections["data"].settings == {"c": 1}
    with pytest.raises(ConfigError, match=r"data\.sttings: unknown field; did you mean settings\?"):
        read(path, "data=[{path: a}]", "data.sttings.c=1")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cach.path=x"], ["pipeline.yaml: cach: unknown top-level key", "did you mean cache"]),
        (
            ["cache.respnse.k=3"],
            ["cache.respnse: unknown field", "did you mean response", "from the override"],
        ),
        (
            ["cache.response.xyz=3"],
            [
                "cache.response.xyz: unknown field; known are method, tau, k, mass, draws, seed, draw_sets, "
                "temperatures, "
                "rounding_kl"
            ],
        ),
        (["cache.zstd=3"], ["cache.zstd: unknown field; did you mean zstd_level?"]),
        (["cache.response.k=many"], ["cache.response.k: got 'many' (str), expected a valid integer"]),
        (["cache.response.k=0"], ["cache.response.k: got 0 (int), expected greater than or equal to 1"]),
        (
            ["cache.response.method=treshold"],
            ["got 'treshold' (str), expected 'threshold', 'topk', 'mass' or 'sampled'; did you mean"],
        ),
        (
            ["cache.relation.pool=2"],
            ["cache.relation: got {'pool': 2}", "pool belongs to encoding 'pooled', but encoding is 'triangle_fp16'"],
        ),
        (
            ["cache.relation={encoding: low_rank, max_cosine_error: 0}"],
            ["cache.relation.max_cosine_error: got 0 (int), expected greater than or equal to 0.000001"],
        ),
        (["cache.families=response"], ["cache.families: got 'response' (str), expected a list"]),
        (["cache.families=[responce]"], ["cache.families.0: got 'responce'", "did you mean 'response'"]),
        (["cache=3"], ["cache: got 3 (int), expected fields of CacheSection"]),
        (["stages=3"], ["stages: got 3 (int), expected names with a StageSection each"]),
        (["stages.dft.init=3"], ["stages.dft.init: got 3 (int), expected a valid string"]),
        (["stages.new.steps=3"], ["stages.new.init: is missing"]),
        (["stages.dft.losses.wieght=3"], ["stages.dft.losses.wieght: unknown field; did you mean weight?"]),
        (["stages.dft.splits=[]"], ["stages.dft.splits: got [] (list), expected at least 1 item"]),
        (["stages.dft.width={rows: 0}"], ["stages.dft.width.rows: got 0 (int), expected greater than or equal to 1"]),
        (["stages.dft.width={}"], ["stages.dft.width: got {} (dict), give either gradient_error or bytes_per_row"]),
        (["stages.dft.width={row: 1}"], ["stages.dft.width.row: unknown field; did you mean rows?"]),
        (["data.sources.1.lmit=3"], ["data.sources.1.lmit: unknown field; did you mean limit?"]),
        (["data.sources.2.limit=3"], ["data.sources: got item '2', expected a number below 2"]),
        (["cache.path.x=3"], ["cache.path: is '{run}/cache' (str) and has no field 'x'"]),
        (["cache.path"], ["override 'cache.path': expected section.field=value"]),
        (["=3"], ["expected section.field=value"]),
        (["cache..path=3"], ["expected section.field=value"]),
        (["cache.path=[1"], ["override 'cache.path=[1': is not valid YAML"]),
        (["name=../x"], ["name: got '../x', expected a folder's name"]),
        (["stages.a/b.init=x"], ["stages.a/b: got 'a/b', expected a name of letters"]),
        ([f"name={'a' * 201}"], ["expected a folder's name of letters, digits, . _ -, at most 200"]),
        (["name=3"], ["name: got 3 (int), expected text"]),
        (["runs_dir=[]"], ["runs_dir: got [] (list), expected text"]),
    ],
)
def test_mistakes_are_named_with_place_got_expected_and_close_matches(path, overrides, expected):
    with pytest.raises(ConfigError) as caught:
        read(path, *overrides)
    for text in expected:
        assert text in str(caught.value)
    assert "pipeline.yaml" in str(caught.value) or "override" in str(caught.value)


def test_all_mistakes_are_reported_at_once(path):
    with pytest.raises(ConfigError) as caught:
        read(path, "cache.response.k=0", "stages.sft.kind=quick", "data.sources.0.path=null")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(str(path)) for line in lines)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"cache: [", "is not valid YAML"),
        (b"- 1\n- 2\n", "expected sections"),
        (b"cache: {path: a}\ncache: {path: b}\n", "the key 'cache' is given twice"),
        (b"cache: {path: a, path: b}\n", "the key 'path' is given twice"),
        (b"? [a]\n: 1\n", "key must be a word"),
        (b"cache: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        (b"name: \xff\n", "is not UTF-8"),
        (b"[" * 1000, "is not valid YAML"),
    ],
)
def test_files_that_are_no_sections_are_refused(tmp_path, content, expected):
    file = tmp_path / "pipeline.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"pipeline\.yaml") as caught:
        read(file)
    assert expected in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        read(tmp_path / "nowhere.yaml")


def test_merge_keys_and_anchors_work(tmp_path):
    file = tmp_path / "pipeline.yaml"
    file.write_text("stages:\n  a: &base {init: x, steps: 3}\n  b: {<<: *base, steps: 4}\n")
    stages = read(file)["stages"]
    assert (stages["b"].init, stages["b"].steps) == ("x", 4)


def test_run_is_replaced_in_defaults_too(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text("name: mine\n")
    assert read_sections(path, {"cache": CacheSection})["cache"].path == "runs/mine/cache"
