"""docs/configuration.md: every field of pipeline.yaml with its type, default, unit and meaning, made from the schema.

    python -m docs.make_fields           # writes the page
    python -m docs.make_fields --check   # exits with 1 if the page is not what the schema says

Types, bounds and defaults are those of the pydantic classes, meanings the comments beside their fields. A field
without a comment has its meaning in docs/field_notes.yaml; a note that no field needs is an error.
"""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stillhouse.config import SCHEMAS
from storage.config import Section
from storage.config_loader import DEFAULT_NAME, DEFAULT_RUNS_DIR, TOP_LEVEL_KEYS, NamedSections
from storage.home_paths import expand_path
from student_train.data.sample_filter import COLUMNS, Condition

PAGE = Path(__file__).with_name("configuration.md")
NOTES = Path(__file__).with_name("field_notes.yaml")
_IDENTIFIER = re.compile(  # snake_case, dotted.names, paths of Python files
    r"(?<![`\w.<{/])(?:[a-z_]+(?:/[a-z_0-9]+)*\.py|[A-Za-z]+(?:_[A-Za-z0-9]+)+(?:\.[a-z_]+)*|[a-z]+(?:\.[a-z_]+)+)(?![\w`(/])"
)
_CODE = re.compile(r"(`[^`]*`)")
_TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null", Any: "any value"}


@dataclass
class Fields:
    """One section's class and the places in the YAML file where it stands."""

    schema: type[Section]
    places: list[str] = field(default_factory=list)


def collect_sections() -> list[Fields]:
    """Every section of the file in reading order, each class once with all of its places."""
    sections: dict[type[Section], Fields] = {}
    for key in TOP_LEVEL_KEYS:
        if key not in SCHEMAS:
            continue
        schema = SCHEMAS[key]
        if isinstance(schema, NamedSections):
            _collect(schema.schema, f"{key}.NAME", sections)
        else:
            _collect(schema, key, sections)
    return list(sections.values())


def _collect(schema: type[Section], place: str, sections: dict[type[Section], Fields]) -> None:
    known = schema in sections
    sections.setdefault(schema, Fields(schema)).places.append(place)
    if known:  # its own sections are told where it came first
        return
    for name, kind in _annotations(schema).items():
        for nested, suffix in _nested(kind):
            _collect(nested, f"{place}.{name}{suffix}", sections)


def _annotations(schema: type[Section]) -> dict[str, Any]:
    hints = get_type_hints(schema, include_extras=True)
    return {name: hints[name] for name in schema.model_fields}


def _nested(kind: Any, suffix: str = "") -> Iterator[tuple[type[Section], str]]:
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind, suffix
    elif origin is Annotated:
        yield from _nested(arguments[0], suffix)
    elif origin in (Union, UnionType):
        for member in arguments:
            yield from _nested(member, suffix)
    elif origin is tuple:
        yield from _nested(arguments[0], f"{suffix}[]")
    elif origin is dict:
        yield from _nested(arguments[1], f"{suffix}.NAME")


def read_comments(schema: type[BaseModel]) -> dict[str, str]:
    """The comment of each field of a class: beside it, on the lines below that, or else above it."""
    source = inspect.getsource(importlib.import_module(schema.__module__))
    comments = {
        token.start[0]: (token.string.lstrip("# ").strip(), source.splitlines()[token.start[0] - 1].lstrip()[0] == "#")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith(("# fmt:", "# noqa", "# type:"))
    }
    (body,) = [
        node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == schema.__name__
    ]
    found: dict[str, str] = {}
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        end = statement.end_lineno or statement.lineno
        beside = [comments[line][0] for line in range(statement.lineno, end + 1) if line in comments]
        line, above, below = statement.lineno - 1, [], []
        while line in comments and comments[line][1]:
            above.insert(0, comments[line][0])
            line -= 1
        line = end + 1
        while line in comments and comments[line][1]:
            below.append(comments[line][0])
            line += 1
        is_of_next = below and isinstance(following, ast.AnnAssign) and not _has_comment(following, comments)
        if beside:
            found[statement.target.id] = " ".join([*beside, *([] if is_of_next else below)])
        elif above:
            found[statement.target.id] = " ".join(above)
    return found


def _has_comment(statement: ast.AnnAssign, comments: Mapping[int, Any]) -> bool:
    return any(line in comments for line in range(statement.lineno, (statement.end_lineno or 0) + 1))


def describe_type(kind: Any) -> str:
    """What may be written, as Markdown."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind == Condition:
        return "[column, comparison, value]"
    if kind in _TYPES:
        return _TYPES[kind]
    if isinstance(kind, type) and issubclass(kind, Section):
        return "section"
    if origin is Annotated:
        inner, bounds = arguments[0], [text for item in arguments[1:] for text in _bounds(item)]
        is_path = any(getattr(item, "func", None) is expand_path for item in arguments[1:])
        return ", ".join(["path" if is_path else describe_type(inner), *bounds])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(member) for member in arguments if member is not NoneType)
    if origin is tuple:
        return f"list of {describe_type(arguments[0])}"
    if origin is dict:
        return f"mapping: {describe_type(arguments[0])} → {describe_type(arguments[1])}"
    raise TypeError(f"no words for the type {kind}")


def _bounds(item: Any) -> Iterator[str]:
    parts = item.metadata if isinstance(item, FieldInfo) else [item]
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "at least"}
    for part in parts:
        for name, sign in signs.items():
            value = getattr(part, name, None)
            if value is not None:
                yield f"{sign} {'2^64' if value == 2**64 else value}{' items' if name == 'min_length' else ''}"


def describe_default(info: FieldInfo) -> str:
    """The default as YAML writes it."""
    default = info.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "**required**"
    if default is None:
        return "–"
    if isinstance(default, BaseModel):
        return "its defaults"
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`" if default != {} else "`{}`"


def as_markdown(text: str) -> str:
    """A comment or docstring as Markdown: names of fields become code, nothing else is markup."""
    pieces = _CODE.split(text)
    for number in range(0, len(pieces), 2):
        plain = html.escape(re.sub(r"\bNone\b", "null", pieces[number]), quote=False)
        plain = _IDENTIFIER.sub(lambda match: f"`{match[0]}`", plain)
        pieces[number] = plain.replace("|", "&#124;").replace("*", "&#42;")
    return "".join(pieces)


def render_section(section: Fields, notes: dict[str, str]) -> str:
    """One class as a heading, its docstring and a table. Notes that are used are taken out of `notes`."""
    schema, comments, annotations = section.schema, read_comments(section.schema), _annotations(section.schema)
    first, *others = section.places
    lines = [f"{'#' * min(4, 2 + first.count('.'))} `{first}` {{ #{anchor(first)} }}", ""]
    if others:
        lines += [f"The same fields: {', '.join(f'`{place}`' for place in others)}.", ""]
    lines += [as_markdown(inspect.cleandoc(schema.__doc__ or "")), ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, info in schema.model_fields.items():
        key = f"{first}.{name}"
        meanings = [text for text in (comments.get(name), notes.pop(key, None)) if text]
        if not meanings:
            raise ValueError(f"{key}: has no comment in {schema.__module__}, and no note in {NOTES.name}")
        kind = describe_type(annotations[name])
        nested = [(nested, suffix) for nested, suffix in _nested(annotations[name])]
        if nested:
            kind = f"[{kind}](#{anchor(_first_place(nested[0][0]))})"
        row = [f"`{name}`", kind, describe_default(info), as_markdown("; ".join(meanings))]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def anchor(place: str) -> str:
    """The heading's id: stages.NAME.losses becomes stages-name-losses."""
    return re.sub(r"[^a-z0-9]+", "-", place.lower()).strip("-")


def _first_place(schema: type[Section]) -> str:
    return next(section.places[0] for section in collect_sections() if section.schema is schema)


def make_page() -> str:
    """The whole page. ValueError: a field without a meaning, or a note without a field."""
    notes: dict[str, str] = yaml.safe_load(NOTES.read_text(encoding="utf-8"))
    sections = [render_section(section, notes) for section in collect_sections()]
    if notes:
        raise ValueError(f"{NOTES.name}: {', '.join(notes)}: no field of that name")
    return HEAD.format(
        name=DEFAULT_NAME, runs_dir=DEFAULT_RUNS_DIR, columns=", ".join(f"`{column}`" for column in COLUMNS)
    ) + "\n".join(sections)


HEAD = """# Configuration

<!-- Made by `python -m docs.make_fields` from the schema and its comments. Change those, not this page. -->

Every field of a YAML file such as `pipeline.yaml`, with its type, its default, its unit and its meaning. Each command
takes `section.field=value` after the file, which replaces one field: `stillhouse dump mine.yaml dump.actors=4`.

- A field that is not known is refused, with the names that are close to it.
- `{{run}}` in a path stands for `<runs_dir>/<name>`; `{{stage}}` and `{{seed}}` for a stage's name and seed, and
  in runs with `rounds` `{{round}}` for the round's number.
- `~` and `$VAR` in a path stand for what they name on this machine.
- `–` in the column *default* means that the field may be left out, or be `null`.

## The file

| field | type | default | meaning |
|---|---|---|---|
| `name` | text | `{name}` | of the run: letters, digits, `.` `_` `-`. Its folder is `<runs_dir>/<name>` |
| `runs_dir` | path | `{runs_dir}` | folder of all runs, relative to the current folder |
| `prepare` | section | – | a script that makes data and models first |
| `data` | section or list of sources | no sources | what the teacher is asked about |
| `teacher` | section | – | the teacher; `teacher.model` is required |
| `dump` | section | its defaults | how the dump's work is cut and who does it |
| `cache` | section | its defaults | where the cache lies and what is kept |
| `check` | section | its defaults | how far an engine may be from the model |
| `more_caches` | mapping: name → section | none | further caches of the same teacher |
| `train_teacher` | section | – | trains the teacher before it is dumped |
| `stages` | mapping: name → section | none | the trainings |
| `evaluation` | section | its defaults | how models are judged |
| `ablations` | section | none | the grid of runs over one cache |

A stage's `filter` may use these columns: {columns}.
Comparisons are `==`, `!=`, `<`, `<=`, `>`, `>=`, `in` and `not in`.

"""


def main(arguments: list[str]) -> int:
    """Writes or checks the page; returns the exit code."""
    page = make_page()
    if arguments == ["--check"]:
        if PAGE.read_text(encoding="utf-8") == page:
            return 0
        sys.stderr.write(f"{PAGE}: is not what the schema says; run `python -m docs.make_fields`\n")
        return 1
    if arguments:
        sys.stderr.write(f"unexpected argument {arguments[0]!r}; usage: python -m docs.make_fields [--check]\n")
        return 2
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
