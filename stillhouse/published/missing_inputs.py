"""What an experiment names and this machine does not have: one list, with where to get each thing.

A Hub model is no mistake by itself, since it is downloaded when it is first needed. It is listed, with size and
licence, once anything else is missing, so that a stranger sees everything at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Literal

from stillhouse.config import Experiment
from stillhouse.published.models import describe_download, load_published_models
from storage.config_loader import read_sections
from student_train.models.loading import is_hub_id
from student_train.training.trainer import resolve_stage
from teacher_dump.config import DataSection, SourceSection

_PARTS = ("vision", "llm", "processor")
_SHOWN_FIELDS = 3  # that name one thing


@dataclass(frozen=True)
class MissingInput:
    """One thing to get or to make."""

    kind: Literal["data", "made", "hub"]
    path: str  # or Hub id
    fields: tuple[str, ...]  # of the file, that name it
    text: str  # what it is and where to get it


def list_missing_inputs(experiment: Experiment, *, is_made: Callable[[str], bool]) -> list[MissingInput]:
    """Lists missing data, folders and models, each once. `is_made`: whether the experiment itself makes a path."""
    found: dict[tuple[str, str], MissingInput] = {}
    for missing in (*_list_data(experiment, is_made), *_list_models(experiment, is_made)):
        known = found.get((missing.kind, missing.path))
        fields = missing.fields if known is None else tuple(dict.fromkeys((*known.fields, *missing.fields)))
        found[missing.kind, missing.path] = MissingInput(missing.kind, missing.path, fields, missing.text)
    return list(found.values())


def format_missing_inputs(path: Path, missing: list[MissingInput]) -> str:
    """Formats the list as one message: data sets, models to make, models to download."""
    by_kind = {kind: [each for each in missing if each.kind == kind] for kind in ("data", "made", "hub")}
    titles = {
        "data": "data sets to download, to these places (or give others: data.sources.N.path=…):",
        "made": "checkpoints to make or to copy here:",
        "hub": "models of the Hub, which commands download when they first need them:",
    }
    num_needed = len(by_kind["data"]) + len(by_kind["made"])
    lines = [f"{path}: {num_needed} {'input is' if num_needed == 1 else 'inputs are'} missing"]
    for kind, group in by_kind.items():
        lines += [titles[kind]] if group else []
        lines += [_format_line(each) for each in group]
    known = load_published_models()
    sizes = [known[each.path].gigabytes for each in by_kind["hub"] if each.path in known]
    if len(sizes) > 1:
        lines.append(f"  {sum(sizes):,.1f} GB in all, as far as sizes are known")
    return "\n".join(lines)


def _format_line(missing: MissingInput) -> str:
    shown = missing.fields if len(missing.fields) <= _SHOWN_FIELDS else missing.fields[: _SHOWN_FIELDS - 1]
    fields = ", ".join(shown) + f" and {len(missing.fields) - len(shown)} more" * (len(shown) < len(missing.fields))
    if missing.kind == "made":
        return f"  {fields} is {missing.path}, which {missing.text}"
    return f"  {missing.path}: {missing.text} [{fields}]"


def _list_data(experiment: Experiment, is_made: Callable[[str], bool]) -> Iterator[MissingInput]:
    named: list[tuple[str, SourceSection]] = [
        (f"data.sources.{number}", source) for number, source in enumerate(experiment.data.sources)
    ]
    if experiment.train_teacher is not None:
        sources = experiment.train_teacher.data.sources
        named += [(f"train_teacher.data.sources.{number}", source) for number, source in enumerate(sources)]
    for path, overrides in experiment.more_caches.items():
        data: DataSection = read_sections(experiment.path, {"data": DataSection}, (*experiment.overrides, *overrides))[
            "data"
        ]
        named += [
            (f"more_caches.{Path(path).name}: data.sources.{number}", source)
            for number, source in enumerate(data.sources)
            if source not in experiment.data.sources
        ]
    for field, source in named:
        if source.format == "datasets" and not Path(source.path).is_absolute():
            continue
        name = source.dataset or "no name is given (data.sources.N.dataset)"
        if not (Path(source.path).exists() or glob(source.path) or is_made(source.path)):  # noqa: PTH207
            yield MissingInput("data", source.path, (field,), name)
        images = source.images
        if images is not None and not (Path(images).exists() or is_made(images)):
            yield MissingInput("data", images, (f"{field}.images",), f"images of {source.dataset or source.path}")


def _list_models(experiment: Experiment, is_made: Callable[[str], bool]) -> Iterator[MissingInput]:
    named: list[tuple[str, str, bool]] = []  # field, path, whether it is the teacher
    if experiment.train_teacher is None:
        named.append(("teacher.model", experiment.teacher.model, True))
    for name, section in experiment.stages.items():
        stage = resolve_stage(section, name)
        named.append((f"stages.{name}.init", stage.init, False))
        if stage.prune is not None:
            named.append((f"stages.{name}.prune.model", stage.prune.model, False))
        for part in _PARTS if stage.compose is not None else ():
            if (path := getattr(stage.compose, part)) is not None:
                named.append((f"stages.{name}.compose.{part}", path, False))
    for field, path, is_teacher in named:
        if Path(path).is_dir() or is_made(path):
            continue
        if is_hub_id(path):
            if not _is_downloaded(path):
                yield MissingInput("hub", path, (field,), describe_download(path))
            continue
        recipe = experiment.teacher.recipe if path == experiment.teacher.model else None
        if recipe is not None:
            maker = experiment.path.parent / recipe
            text = f"{maker} makes; see `stillhouse check {maker}`"
        elif is_teacher:
            text = "is neither a folder nor a Hub id such as llava-hf/llava-1.5-7b-hf"
        else:
            text = (
                "is neither a directory, nor the output of a stage, nor made for one by compose or prune, nor a Hub id "
                "(owner/name)"
            )
        yield MissingInput("made", path, (field,), text)


def _is_downloaded(name: str) -> bool:
    """Whether the Hub's local cache has a model's configuration, and so, most likely, its other files."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)
