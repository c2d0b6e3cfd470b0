"""The command `stillhouse`, the same as `python -m stillhouse`.

Exit codes: 0 success; 2 a user's mistake, explained in one message; 1 a failure; 130 after SIGINT and 143 after
SIGTERM, when every process that the verb started has ended; 141 if the reader of the output has closed it.

A verb imports its modules when it runs, since the libraries that its comment names take from 0.3 to 5 seconds and
`--help` must not wait for them.
"""

from __future__ import annotations

import sys
from pathlib import Path

# `python -m` puts the current folder first, where a user's own storage.py would shadow our package.
if __name__ == "__main__" and not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parent.parent:
    del sys.path[0]

import argparse
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from storage.entry_point import run_command
from storage.errors import ConfigError, NoCacheError, StillhouseError
from storage.processes.search_path import check_current_folder

if TYPE_CHECKING:  # torch
    from teacher_dump.audit.replay import Replay
    from teacher_dump.settings import DumpSettings

DEFAULT_FILE = "pipeline.yaml"
_LENGTHS = ("question_tokens", "response_tokens", "caption_tokens")  # options of `plan --hardware`
Verb = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code. Without `argv` the verb owns this process, and a signal ends it."""
    return run_command(
        lambda: _run_verb(argv), owns_process=argv is None, prefix="stillhouse: ", stop_prefix="stillhouse: "
    )


def _run_verb(argv: Sequence[str] | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # or a terminal that is not UTF-8 raises an error
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    check_current_folder()
    _parse_overrides(arguments, rest)
    with _reserve_stdout(arguments):
        arguments.run(arguments)
    sys.stdout.flush()


@contextmanager
def _reserve_stdout(arguments: argparse.Namespace) -> Iterator[None]:
    """Sets `arguments.output` to stdout. With --json all other output, of C++ and children too, goes to stderr."""
    arguments.output = sys.stdout
    if not getattr(arguments, "json", False):
        yield
        return
    sys.stdout.flush()
    if sys.stdout is not sys.__stdout__:  # an object without a file descriptor, as in tests
        with redirect_stdout(sys.stderr):
            yield
        return
    stdout, stderr = sys.stdout.fileno(), sys.stderr.fileno()
    with os.fdopen(os.dup(stdout), "w", encoding="utf-8") as arguments.output:
        os.dup2(stderr, stdout)
        try:
            yield
        finally:
            sys.stdout.flush()
            arguments.output.flush()
            os.dup2(arguments.output.fileno(), stdout)


def _print_json(arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    print(json.dumps(document), file=arguments.output)


def build_parser() -> argparse.ArgumentParser:
    """Every verb with its arguments."""
    parser = argparse.ArgumentParser(
        prog="stillhouse", description="Run the big teacher once; train every student from the cache."
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def add_verb(name: str, run: Verb, text: str, *, file: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, takes_file=file)
        if file:
            sub.add_argument("words", nargs="*", metavar="FILE | section.field=value", help=f"default {DEFAULT_FILE}")
        return sub

    restart = "discard the states of unfinished trainings that had other settings"
    sub = add_verb("run", _run, "everything: data, teacher, dump, verify, train, evaluate, report")
    sub.add_argument("--restart", action="store_true", help=restart)
    sub = add_verb("check", _check, "validate configuration, data and prompts before anything costs money")
    sub.add_argument("--engine", action="store_true", help="also compare vLLM with transformers on a few samples")
    sub = add_verb("plan", _plan, "parts, bytes and hours of the dump, estimated from a few hundred samples")
    sub.add_argument("--samples", type=int, default=256, metavar="N", help="samples to estimate from (256)")
    sub.add_argument("--json", action="store_true", help="print the forecast as one JSON object")
    sub.add_argument(
        "--hardware", metavar="NAMExN", help="estimate all stages from published sizes instead, such as h100x8"
    )
    sub.add_argument("--price-per-gpu-hour", type=float, metavar="PRICE", help="with --hardware: money, too")
    for kind in ("question", "response", "caption"):
        sub.add_argument(f"--{kind}-tokens", type=int, metavar="N", help="with --hardware: mean tokens of a sample's")
    sub = add_verb("dump", _dump, "run the teacher once and write the cache")
    sub.add_argument("--retry-errors", action="store_true", help="try samples again that failed before")
    sub.add_argument("--cache", metavar="NAME", help="write this one of more_caches instead of the main cache")
    sub = add_verb("verify", _verify, "full scan of a cache: checksums, bounds, counts", file=False)
    sub.add_argument("cache", help="a folder, or s3://bucket/prefix")
    sub.add_argument(
        "words", nargs="*", metavar="FILE | section.field=value", help=f"of --replay; default {DEFAULT_FILE}"
    )
    sub.add_argument("--json", action="store_true", help="print the report as one JSON object")
    sub.add_argument("--replay", type=int, metavar="N", help="score N random samples again with the teacher of FILE")
    sub.add_argument("--seed", type=int, default=0, help="seed that draws those samples")
    sub.set_defaults(takes_file=True)
    sub = add_verb("inspect", _inspect, "what is in a cache, and the teacher's signals of a sample", file=False)
    sub.add_argument("cache", help="a folder, or s3://bucket/prefix")
    sub.add_argument("--sample", action="append", default=[], metavar="ID", help="show this sample; may be repeated")
    sub.add_argument("--html", type=Path, metavar="OUT", help="write a page; without --sample an overview")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the teacher's folder, if it is there")
    sub.add_argument("--images", type=Path, metavar="DIR", help="default: the image root that the cache names")
    sub.add_argument("--json", action="store_true", help="print everything as one JSON object")
    sub = add_verb("train", _train, "train one stage under torchrun")
    sub.add_argument("--stage", required=True)
    sub.add_argument("--again", action="store_true", help="train a finished stage again and replace its result")
    sub.add_argument("--restart", action="store_true", help="discard the state of an unfinished training")
    sub = add_verb("evaluate", _evaluate, "accuracy of a model, and its fidelity to the cached teacher")
    sub.add_argument("--model", type=Path, required=True, metavar="DIR")
    sub = add_verb("ask", _ask, "ask any teacher or student about an image", file=False)
    sub.add_argument("--model", type=Path, required=True, metavar="DIR")
    sub.add_argument("--image", type=Path, required=True, metavar="FILE")
    sub.add_argument("--max-new-tokens", type=int, default=64)
    sub.add_argument("question")
    sub = add_verb("ablate", _ablate, "the ablation grid over one cache")
    sub.add_argument("--restart", action="store_true", help=restart)
    sub = add_verb("report", _report, "report.json and report.html of a run; several runs are compared", file=False)
    sub.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="a run's folder, such as runs/digits")
    sub.add_argument(
        "--output",
        dest="page",
        type=Path,
        metavar="FILE",
        help="of a comparison (comparison.html beside the first DIR)",
    )
    sub = add_verb("convert", _convert, "a checkpoint in another format into one of transformers", file=False)
    sub.add_argument("source", type=Path, metavar="SOURCE", help="its folder, or a .gguf file")
    sub.add_argument("target", type=Path, metavar="TARGET", help="a folder that does not exist")
    sub.add_argument("--vision-tower", type=Path, metavar="DIR", help="of a source that only names its tower")
    sub.add_argument("--base", type=Path, metavar="DIR", help="the decoder of a lone mm_projector.bin")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="one with the source's vocabulary")
    sub.add_argument("--template", metavar="NAME", help="the chat template that the model was trained with")
    sub.add_argument("--dtype", default="float32", help="of a GGUF file's weights (float32)")
    return parser


def _parse_overrides(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Splits a verb's words into the YAML file and its overrides. ConfigError for a word that is neither."""
    if not arguments.takes_file:
        if rest:
            raise ConfigError(f"unexpected argument {rest[0]!r}; see `stillhouse VERB --help`")
        return
    words = arguments.given = [*arguments.words, *rest]
    unknown = [word for word in words if word.startswith("-")]
    files = [word for word in words if "=" not in word and not word.startswith("-")]
    if unknown:
        raise ConfigError(f"unexpected option {unknown[0]!r}; see `stillhouse VERB --help`")
    if len(files) > 1:
        raise ConfigError(f"got {len(files)} files ({', '.join(files)}), expected one and section.field=value")
    arguments.file = Path(files[0] if files else DEFAULT_FILE)
    arguments.overrides = [word for word in words if "=" in word]


def _check_folder(path: Path, name: str) -> None:
    if not path.is_dir():
        raise ConfigError(f"{name} {path} is not a folder")


def _check_cache_exists(path: str) -> None:
    from storage.backends.folder import is_url, open_folder  # pyarrow
    from storage.layout.segments import has_cache

    if not is_url(path):
        _check_folder(Path(path), "CACHE")
    if not has_cache(open_folder(path)):
        raise NoCacheError(f"{path}: no cache is here (cache.json is missing); run the dump")


def _run(arguments: argparse.Namespace) -> None:
    from stillhouse.config import read_experiment  # torch, matplotlib, Ray
    from stillhouse.reporting.summary import print_summary
    from stillhouse.run import run_experiment

    page = run_experiment(read_experiment(arguments.file, arguments.overrides), restart=arguments.restart)
    print_summary(page.parent)


def _check(arguments: argparse.Namespace) -> None:
    from stillhouse.check import check_engine_outputs, check_experiment  # torch, transformers, Ray
    from stillhouse.config import read_experiment

    experiment = read_experiment(arguments.file, arguments.overrides)
    for line in check_experiment(experiment):
        print(line)
    if arguments.engine:
        check_engine_outputs(experiment, notify=partial(print, flush=True))


def _dump(arguments: argparse.Namespace) -> None:
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


def _plan(arguments: argparse.Namespace) -> None:
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


def _verify(arguments: argparse.Namespace) -> None:
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


def _inspect(arguments: argparse.Namespace) -> None:
    from stillhouse.inspection.inspect_cache import inspect_cache  # pyarrow

    _check_cache_exists(arguments.cache)
    for folder, name in ((arguments.tokenizer, "--tokenizer"), (arguments.images, "--images")):
        if folder is not None:
            _check_folder(folder, name)
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


def _train(arguments: argparse.Namespace) -> None:
    from stillhouse.config import read_experiment  # torch, Ray
    from stillhouse.preflight import check_stage_inputs
    from stillhouse.run import train_stage
    from stillhouse.torchrun import make_training_flags

    experiment = read_experiment(arguments.file, arguments.overrides)
    check_stage_inputs(experiment, arguments.stage)
    flags = make_training_flags(again=arguments.again, restart=arguments.restart, if_changed=False)
    train_stage(experiment, arguments.stage, flags=flags)


def _evaluate(arguments: argparse.Namespace) -> None:
    from stillhouse.config import read_experiment  # torch, Ray
    from stillhouse.reporting.summary import describe_evaluation
    from stillhouse.run import evaluate_model

    _check_folder(arguments.model, "--model")
    print(describe_evaluation(evaluate_model(read_experiment(arguments.file, arguments.overrides), arguments.model)))


def _ask(arguments: argparse.Namespace) -> None:
    from student_train.evaluation.ask import answer_question  # torch, transformers

    _check_folder(arguments.model, "--model")
    if not arguments.image.is_file():
        raise ConfigError(f"--image {arguments.image} is not a file")
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {arguments.max_new_tokens}, expected at least 1")
    if not arguments.question.strip() or "\ufffd" in arguments.question.encode(errors="replace").decode():
        raise ConfigError("the question is empty or not UTF-8")
    print(
        answer_question(arguments.model, arguments.image, arguments.question, max_new_tokens=arguments.max_new_tokens)
    )


def _ablate(arguments: argparse.Namespace) -> None:
    from stillhouse.ablate import ablate  # torch, Ray, matplotlib
    from stillhouse.config import read_experiment
    from stillhouse.preflight import print_warnings
    from stillhouse.report_page.write_report import write_report
    from stillhouse.reporting.summary import print_summary

    experiment = read_experiment(arguments.file, arguments.overrides)
    print_warnings(experiment, dumps=False)
    ablate(experiment, restart=arguments.restart)
    write_report(experiment.run)
    print_summary(experiment.run)


def _convert(arguments: argparse.Namespace) -> None:
    from stillhouse.conversion.conversion import Options  # torch, transformers
    from stillhouse.conversion.convert import convert

    options = Options(
        vision_tower=arguments.vision_tower,
        base=arguments.base,
        tokenizer=arguments.tokenizer,
        template=arguments.template,
        dtype=arguments.dtype,
    )
    converted = convert(arguments.source, arguments.target, options)
    done = "converted" if converted.is_new else "nothing to do; it was converted"
    print(f"{arguments.target}: {done} from {converted.format} ({arguments.source})")
    for note in converted.notes:
        print(f"  {note}")


def _report(arguments: argparse.Namespace) -> None:
    if len(arguments.folders) > 1:
        from stillhouse.reporting.experiment_comparison import compare_experiments, default_output  # matplotlib

        print(compare_experiments(arguments.folders, arguments.page or default_output(arguments.folders)))
        return
    from stillhouse.report_page.write_report import write_report  # matplotlib, scipy
    from stillhouse.reporting.summary import print_summary

    if arguments.page is not None:
        raise ConfigError(
            f"--output {arguments.page} is for a comparison of several folders; the page of one lies in it"
        )
    (folder,) = arguments.folders
    write_report(folder)
    print_summary(folder)


if __name__ == "__main__":
    sys.exit(main())
