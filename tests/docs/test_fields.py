"""docs/configuration.md is what the schema says, and names of fields in the documentation exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.make_fields import PAGE, collect_sections, describe_type, main, make_page, read_comments, render_section
from stillhouse.config import SCHEMAS, AblationsSection
from storage.config import Section, SelectionSection
from storage.config_loader import TOP_LEVEL_KEYS, NamedSections, _find_types, read_sections
from student_train.config import StageSection
from student_train.losses.config import RelationLossSection
from teacher_dump.config import DataSection, SourceSection, TeacherSection

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
SNIPPETS = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in PAGES
    for number, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE))
]
DOTTED = re.compile(rf"`((?:{'|'.join(SCHEMAS)}|losses)\.[A-Za-z_.]+)")


def test_the_committed_page_is_what_the_schema_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(), "run `python -m docs.make_fields`"
    assert main(["--check"]) == 0
    assert main(["nonsense"]) == 2


def test_the_page_has_every_field_once_and_a_meaning_for_each() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    fields = [name for section in collect_sections() for name in section.schema.model_fields]
    assert len(rows) == len(fields) + len(TOP_LEVEL_KEYS)
    assert all(meaning.strip() for _, meaning in rows)
    assert len(fields) > 120


def test_comments_beside_above_and_below_a_field_are_its_meaning() -> None:
    assert read_comments(SelectionSection)["tau"] == "probability, threshold only"
    assert read_comments(SourceSection)["ids"].endswith("name@2, and so on")  # goes on below
    assert read_comments(DataSection)["extracted"].startswith("folder for images")  # within brackets
    comments = read_comments(TeacherSection)
    assert comments["chat_template_arguments"].startswith("passed to the chat template")  # above, and not `settings`'
    assert "chat template" not in comments["settings"]


def test_types_say_bounds_and_choices() -> None:
    assert describe_type(StageSection.model_fields["zero_stage"].annotation) == "`0` or `1` or `2` or `3`"
    assert "number, > 0, < 1" in make_page()
    assert "list of [column, comparison, value]" in make_page()


def holds(schema: Any, names: list[str]) -> bool:
    return not names or bool(_find_types(schema, names))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_field_that_a_page_names_exists(page: Path) -> None:
    for dotted in DOTTED.findall(page.read_text(encoding="utf-8")):
        if dotted.endswith((".json", ".yaml", ".py")):
            continue
        first, *names = dotted.rstrip(".").split(".")
        schema: Any = StageSection if first == "losses" else SCHEMAS[first]
        if first == "losses":
            names.insert(0, first)
        if isinstance(schema, NamedSections):
            schema, names = schema.schema, names[1:]
        assert holds(schema, names), f"{page.name}: {dotted}"


@pytest.mark.parametrize("text", SNIPPETS)
def test_every_yaml_snippet_is_one_that_the_schema_takes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "snippet.yaml"
    document = yaml.safe_load(re.sub(r"\{(run|seed|stage)\}", r"\1", text))
    assert set(document) <= set(TOP_LEVEL_KEYS)
    if "teacher" in document:  # a guide may show one field of it
        document["teacher"].setdefault("model", "/models/teacher")
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    sections = read_sections(path, {key: schema for key, schema in SCHEMAS.items() if key in document})
    stages = sections["stages"] if "stages" in document else {}
    for run in getattr(sections.get("ablations"), "runs", {}).values():
        assert run.stage in stages
        read_sections(path, {"stages": NamedSections(StageSection)}, run.make_overrides())
    assert isinstance(sections.get("ablations", AblationsSection()), Section)


def test_a_field_without_any_meaning_is_refused() -> None:
    (section,) = [section for section in collect_sections() if section.schema is RelationLossSection]
    with pytest.raises(ValueError, match=r"relation\.weight: has no comment in student_train\.losses\.config"):
        render_section(section, {})
    notes = {f"{section.places[0]}.weight": "factor", "stages.NAME.gone": "of nothing"}
    assert "| `weight` | number, > 0 | `1.0` | factor |" in render_section(section, notes)
    assert list(notes) == ["stages.NAME.gone"]  # which make_page refuses
