"""The verbs of a cache: plan, dump, verify, inspect."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.verbs.folder_check import check_folder
from storage.errors import ConfigError, NoCacheError, StillhouseError

if TYPE_CHECKING:  # torch
    from teacher_dump.audit.replay import Replay
    from teacher_dump.settings import DumpSettings

_LENGTHS = ("question_tokens", "response_tokens", "caption_tokens")  # options of `plan --hardware`


def run_plan(arguments: argparse.Namespace) -> None:
    """`stillhouse plan`."""
    from stillhouse.preflight import write_forecast  # torch, Ray
    from stillhouse.reporting.plan_table import format_forecast
    from teacher_dump.engine_check.gate import has_engine, measure_engine, refuse_difference
    from teacher_dump.estimates.cost_calibration import forecast_dump
    from teacher_dump.planning.dump_plan import plan_dump
    from teacher_dump.settings import read_settings

    if arguments.hardware is not None:
        return _plan_from_published_sizes(arguments)
    for option in ("price_per_gpu_hour", *_LENGTHS):
        if getattr(arguments, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')} is for a forecast of published sizes; give --hardware too")
    if arguments.samples < 2:
        raise ConfigError(f"--samples is {arguments.samples}, expected at least 2")
    settings = read_settings(arguments.file, arguments.overrides)
    planned = plan_dump(settings)
    forecast = forecast_dump(settings, num_samples=arguments.samples, planned=planned)
    write_forecast(settings.run, num_samples=forecast.samples, num_bytes=forecast.total_bytes)
    if not arguments.json:
        print(format_forecast(forecast), flush=True)
    checks = has_engine(planned, settings) and settings.dump.engine_check
    record = measure_engine(planned, settings, notify=partial(print, flush=True)) if checks else None
    if arguments.json:
        check = {} if record is None else {"engine_check": record.model_dump(mode="json")}
        _print_json(arguments, {**asdict(forecast), "total_bytes": forecast.total_bytes, **check})
    if record is not None:
        refuse_difference(record, planned, settings)
    return None


def _plan_from_published_sizes(arguments: argparse.Namespace) -> None:
    from stillhouse.config import read_experiment  # torch, Ray
    from stillhouse.published.assumptions import SampleLengths
    from stillhouse.published.forecast_text import format_recipe_forecast, list_assumptions
    from stillhouse.published.hardware import parse_hardware
    from stillhouse.published.recipe_forecast import forecast_recipe

    hardware, price = parse_hardware(arguments.hardware), arguments.price_per_gpu_hour
    given = {option: getattr(arguments, option) for option in _LENGTHS if getattr(arguments, option) is not None}
    for option, value in {**given, "price_per_gpu_hour": 0.0 if price is None else price}.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"--{option.replace('_', '-')} is {value}, expected a number of at least 0")
    forecast = forecast_recipe(
        read_experiment(arguments.file, arguments.overrides),
        hardware,
        lengths=SampleLengths(**{option.removesuffix("_tokens"): value for option, value in given.items()}),
        price_per_gpu_hour=price,
    )
    if arguments.json:
        _print_json(arguments, {**forecast.to_json(), "assumptions": list_assumptions(forecast)})
    else:
        print(format_recipe_forecast(forecast))


def run_dump(arguments: argparse.Namespace) -> None:
    """`stillhouse dump`."""
    from storage.config_loader import read_sections
    from teacher_dump.__main__ import format_result, warn_of_machine  # pyarrow, and Ray when it runs
    from teacher_dump.dump import run_dump
    from teacher_dump.settings import read_settings

    overrides = [*arguments.overrides, *_make_cache_overrides(arguments)]
    settings = read_settings(arguments.file, overrides)
    stages = read_sections(arguments.file, {}, overrides).document.get("stages")
    sections = stages.values() if isinstance(stages, dict) else ()
    composes = any(isinstance(fields, dict) and fields.get("compose") for fields in sections)
    if composes and not Path(settings.teacher.model).is_dir():
        from stillhouse.composed_teacher import compose_teacher  # torch, transformers
        from stillhouse.config import read_experiment

        compose_teacher(read_experiment(arguments.file, arguments.overrides))
    warn_of_machine(settings)
    print(format_result(run_dump(settings, retry_errors=arguments.retry_errors)))


def _make_cache_overrides(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The replaced fields of the cache that --cache names. ConfigError if more_caches has none of that name."""
    if arguments.cache is None:
        return ()
    from stillhouse.config import read_experiment  # torch, Ray

    caches = {
        Path(path).name: fields
        for path, fields in read_experiment(arguments.file, arguments.overrides).more_caches.items()
    }
    if arguments.cache not in caches:
        known = ", ".join(caches) or "none"
        raise ConfigError(f"--cache is {arguments.cache!r}; more_caches of {arguments.file} has {known}")
    return caches[arguments.cache]


def run_verify(arguments: argparse.Namespace) -> None:
    """`stillhouse verify`."""
    from stillhouse.cache_scan import scan_with_progress  # pyarrow

    if arguments.replay is None and arguments.given:
        raise ConfigError(f"unexpected argument {arguments.given[0]!r}: FILE and overrides are for --replay N")
    _check_cache_exists(arguments.cache)
    settings = None if arguments.replay is None else _read_replay_settings(arguments)  # mistakes show before the scan
    report = scan_with_progress(arguments.cache)
    replayed = _replay(arguments, settings) if report.ok and settings is not None else None
    if arguments.json:
        _print_json(arguments, asdict(report) | ({} if replayed is None else {"replay": asdict(replayed)}))
    elif report.ok:
        print(f"{arguments.cache}: whole; {report.num_samples:,} samples in {report.num_parts:,} parts")
    if not report.ok:
        raise StillhouseError(f"{arguments.cache}: {len(report.problems)} problems\n  " + "\n  ".join(report.problems))
    if replayed is not None:
        from teacher_dump.audit.replay import check_drift, format_replay  # torch

        if not arguments.json:
            print(format_replay(replayed))
        check_drift(replayed, arguments.cache)


def _read_replay_settings(arguments: argparse.Namespace) -> DumpSettings:
    from teacher_dump.settings import read_settings  # pydantic

    if arguments.replay < 1 or arguments.seed < 0:
        raise ConfigError(f"--replay is {arguments.replay} and --seed {arguments.seed}, expected at least 1 and 0")
    return read_settings(arguments.file, arguments.overrides)


def _replay(arguments: argparse.Namespace, settings: DumpSettings) -> Replay:
    from teacher_dump.audit.replay import replay  # torch

    return replay(settings, arguments.cache, num_samples=arguments.replay, seed=arguments.seed)


def run_inspect(arguments: argparse.Namespace) -> None:
    """`stillhouse inspect`."""
    from stillhouse.inspection.inspect_cache import inspect_cache  # pyarrow

    _check_cache_exists(arguments.cache)
    for folder, name in ((arguments.tokenizer, "--tokenizer"), (arguments.images, "--images")):
        if folder is not None:
            check_folder(folder, name)
    print(
        inspect_cache(
            arguments.cache,
            sample_ids=arguments.sample,
            tokenizer=arguments.tokenizer,
            images=arguments.images,
            html=arguments.html,
            as_json=arguments.json,
        ),
        file=arguments.output,
    )


def _check_cache_exists(path: str) -> None:
    from storage.backends.folder import is_url, open_folder  # pyarrow
    from storage.layout.segments import has_cache

    if not is_url(path):
        check_folder(Path(path), "CACHE")
    if not has_cache(open_folder(path)):
        raise NoCacheError(f"{path}: no cache is here (cache.json is missing); run the dump")


def _print_json(arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    print(json.dumps(document), file=arguments.output)
