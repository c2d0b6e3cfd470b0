"""Reads the sections of pipeline.yaml that an entry point needs, with `section.field=value` overrides.

Each section's schema belongs to its own package. This module owns the top-level keys, the overrides,
the `{run}` placeholder and the error messages.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from yaml.constructor import ConstructorError

from storage.config import Section
from storage.errors import ConfigError
from storage.home_paths import expand_path

TOP_LEVEL_KEYS = (
    "name", "runs_dir", "prepare", "data", "teacher", "dump", "cache", "check", "more_caches", "train_teacher",
    "stages", "evaluation", "ablations",
)  # fmt: skip
_LISTS = {"data": "sources"}  # a section that may be a list: of that field of its own
_NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")  # file systems take 255 bytes, with what we append
DEFAULT_NAME = "digits"
DEFAULT_RUNS_DIR = "runs"


@dataclass(frozen=True)
class NamedSections:
    """A section that maps user-chosen names to sections of one schema, such as `stages:`."""

    schema: type[Section]


@dataclass(frozen=True)
class Sections(Mapping[str, Any]):
    """The validated sections: sections["cache"] is a CacheSection, sections["stages"] a dict by name."""

    path: Path  # of the YAML file
    name: str
    runs_dir: Path
    checked: Mapping[str, Any]  # by name, what sections[name] gives
    document: Mapping[str, Any]  # the whole file as plain data, overrides applied and {run} replaced

    @property
    def run(self) -> Path:
        """The run's folder, `<runs_dir>/<name>`, relative to the current folder."""
        return self.runs_dir / self.name

    def __getitem__(self, key: str) -> Any:
        return self.checked[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.checked)

    def __len__(self) -> int:
        return len(self.checked)


def read_sections(
    path: str | Path, schemas: Mapping[str, type[Section] | NamedSections], overrides: Sequence[str] = ()
) -> Sections:
    """Reads and validates the sections named in `schemas`; other sections are not validated.

    A section that the file lacks gets its schema's defaults. Errors: ConfigError naming the file, the
    dotted field, the value, what is expected, and close matches of a misspelt name.
    """
    path = Path(path)
    document = _apply_overrides(path, _load_document(path), overrides)
    _refuse_unknown(str(path), "top-level key", document, TOP_LEVEL_KEYS)
    name = _read_text_field(path, document, "name", DEFAULT_NAME)
    if not _NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"{path}: name: got {name!r}, expected a folder's name of letters, digits, . _ -, at most 200"
        )
    try:
        runs_dir = Path(expand_path(_read_text_field(path, document, "runs_dir", DEFAULT_RUNS_DIR)))
    except ValueError as error:
        raise ConfigError(f"{path}: runs_dir: {error}") from error
    document = _replace_run(document, str(runs_dir / name))
    problems: list[str] = []
    checked = {key: _check_section(key, schema, document.get(key), problems) for key, schema in schemas.items()}
    if problems:
        raise ConfigError(
            "\n".join(f"{path}: {problem}{_describe_override(problem, overrides)}" for problem in problems)
        )
    checked = {key: _replace_run_in_defaults(section, str(runs_dir / name)) for key, section in checked.items()}
    return Sections(path, name, runs_dir, checked, document)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys and reads 2e-5 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+"),
    list("-+.0123456789"),
)


def _load_document(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from error
    document = _parse_yaml(str(path), text)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: got {_shorten(document)}, expected sections such as `cache:`")
    return document


def _parse_yaml(place: str, text: str) -> Any:
    try:
        text = re.sub(r"\{([a-z_]+)\}", "\ue000\\1\ue001", text)  # so that {run}/x needs no quotes
        return _restore_braces(yaml.load(text, Loader=_Loader))  # a SafeLoader: plain data only
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: is not valid YAML: {error}") from error


def _restore_braces(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\ue000", "{").replace("\ue001", "}")
    if isinstance(value, dict):
        return {_restore_braces(key): _restore_braces(item) for key, item in value.items()}
    return [_restore_braces(item) for item in value] if isinstance(value, list) else value


def _apply_overrides(path: Path, document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override {override!r}: expected section.field=value")
        section = document.get(keys[0])
        if keys[0] in _LISTS and len(keys) > 1:
            if isinstance(section, list) and not keys[1].isdecimal():
                document[keys[0]] = {_LISTS[keys[0]]: section}  # so that its other fields can be set
            elif isinstance(section, dict) and keys[1].isdecimal():
                keys.insert(1, _LISTS[keys[0]])  # a list still, for whoever wrote it so
        _set_field(document, keys, _parse_yaml(f"override {override!r}", text), f"override {override!r}: {path}: ")
    return document


def _set_field(document: dict[str, Any], keys: list[str], value: Any, place: str) -> None:
    node: Any = document
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                where = ".".join(keys[:depth])
                raise ConfigError(f"{place}{where}: got item {key!r}, expected a number below {len(node)}")
            slot: Any = int(key)
        elif isinstance(node, dict):
            slot = key
        else:
            where = ".".join(keys[:depth])
            raise ConfigError(f"{place}{where}: is {_shorten(node)} and has no field {key!r}")
        if last:
            node[slot] = value
        else:
            if isinstance(node, dict) and node.get(slot) is None:
                node[slot] = {}
            node = node[slot]


def _read_text_field(path: Path, document: Mapping[str, Any], key: str, default: str) -> str:
    value = document.get(key, default)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{path}: {key}: got {_shorten(value)}, expected text")
    return value


def _replace_run(value: Any, run: str) -> Any:
    if isinstance(value, str):
        return value.replace("{run}", run)
    if isinstance(value, dict):
        return {key: _replace_run(item, run) for key, item in value.items()}
    return [_replace_run(item, run) for item in value] if isinstance(value, list) else value


def _replace_run_in_defaults(section: Any, run: str) -> Any:
    """Replaces `{run}` in texts that came from a schema's defaults, in one section or a dict of them."""
    if isinstance(section, dict):
        return {name: _replace_run_in_defaults(item, run) for name, item in section.items()}
    texts = {name: text for name in type(section).model_fields if isinstance(text := getattr(section, name), str)}
    return section.model_copy(update={name: _replace_run(text, run) for name, text in texts.items()})


def _check_section(key: str, schema: type[Section] | NamedSections, value: Any, problems: list[str]) -> Any:
    value = {} if value is None else value
    if not isinstance(schema, NamedSections):
        return _validate_section(key, schema, value, problems)
    if not isinstance(value, dict):
        problems.append(f"{key}: got {_shorten(value)}, expected names with a {schema.schema.__name__} each")
        return None
    for name in value:
        if not _NAME_PATTERN.fullmatch(str(name)):
            problems.append(f"{key}.{name}: got {name!r}, expected a name of letters, digits, . _ -, at most 200")
    return {
        str(name): _validate_section(f"{key}.{name}", schema.schema, {} if item is None else item, problems)
        for name, item in value.items()
    }


def _validate_section(place: str, schema: type[Section], value: Any, problems: list[str]) -> Section | None:
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        for detail in error.errors():
            problems.append(_describe_problem(place, schema, detail))
    return None


def _describe_problem(place: str, schema: type[Section], detail: Any) -> str:
    location = _drop_validator_names(schema, detail["loc"], is_unknown=detail["type"] == "extra_forbidden")
    where = ".".join([place, *map(str, location)])
    if detail["type"] == "extra_forbidden":
        known = [name for model in _find_models(schema, location[:-1]) for name in model.model_fields]
        return f"{where}: unknown field; {_suggest_names(str(location[-1]), known)}"
    if detail["type"] == "missing":
        return f"{where}: is missing; this field has no default"
    message = str(detail["msg"]).removeprefix("Value error, ")
    expected = re.sub(r"^Input should be ", "expected ", message).replace("a valid tuple", "a list")
    expected = re.sub(r"^Tuple should have (at least \d+ items?) after.*", r"expected \1", expected)
    expected = re.sub(r"a valid dictionary or instance of (\w+)", r"fields of \1", expected)
    close = difflib.get_close_matches(
        str(detail["input"]), re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
    )
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{where}: got {_shorten(detail['input'])}, {expected}{hint}"


def _drop_validator_names(schema: Any, location: Sequence[int | str], *, is_unknown: bool) -> list[int | str]:
    """Returns an error's location without the names of validators and union members that pydantic inserts.

    Examples: `width.function-after[_ordered(), Range].max`, `init.list[str]`. A step is kept if the schema
    has such a field, item or key. `is_unknown`: the last step is a field that the schema lacks; it is kept.
    """
    kept: list[int | str] = []
    for number, step in enumerate(location):
        is_last = is_unknown and number == len(location) - 1
        if is_last or _find_next_types(_find_types(schema, kept), step):
            kept.append(step)
    return kept


def _find_types(schema: Any, location: Sequence[int | str]) -> list[Any]:
    found = [schema]
    for step in location:
        found = _find_next_types(found, step)
    return found


def _find_next_types(kinds: Sequence[Any], step: int | str) -> list[Any]:
    """Returns the types that a field, item or key of these types may have; unions are expanded."""
    following: list[Any] = []
    for kind in [member for parent in kinds for member in _expand_unions(parent)]:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if step in kind.model_fields:
                following.append(kind.model_fields[str(step)].annotation)
        elif arguments := [item for item in get_args(kind) if item is not Ellipsis]:
            origin = get_origin(kind)
            is_mapping = isinstance(origin, type) and issubclass(origin, Mapping)
            if is_mapping or (isinstance(step, int) and origin is not Literal):
                following.append(arguments[-1])
    return following


def _find_models(schema: Any, location: Sequence[int | str]) -> list[type[BaseModel]]:
    """Returns the models that a location may lie in."""
    return [
        member
        for kind in _find_types(schema, location)
        for member in _expand_unions(kind)
        if isinstance(member, type) and issubclass(member, BaseModel)
    ]


def _expand_unions(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _expand_unions(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for argument in get_args(kind) for member in _expand_unions(argument)]
    return [kind]


def _refuse_unknown(place: str, what: str, got: Mapping[Any, Any], known: Sequence[str]) -> None:
    for key in got:
        if key not in known:
            raise ConfigError(f"{place}: {key}: unknown {what}; {_suggest_names(str(key), known)}")


def _suggest_names(got: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(got, known, n=3) or [name for name in known if name.startswith(got)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known are {', '.join(known)}" if known else "no fields are expected there"


def _describe_override(problem: str, overrides: Sequence[str]) -> str:
    """Returns a note naming the override that caused a problem; empty if none did."""
    where = problem.partition(": ")[0] + "."
    made = []
    for override in overrides:
        dotted = override.partition("=")[0].strip() + "."
        if where.startswith(dotted) or dotted.startswith(where):
            made.append(override)
    return f" (from the override {made[-1]!r})" if made else ""


def _shorten(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
