"""The command line: every verb with its arguments, and words as a file and its overrides."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from stillhouse.verbs import cache_verbs, experiment_verbs, model_verbs
from storage.errors import ConfigError

DEFAULT_FILE = "pipeline.yaml"
Verb = Callable[[argparse.Namespace], None]


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
    sub = add_verb("run", experiment_verbs.run_run, "everything: data, teacher, dump, verify, train, evaluate, report")
    sub.add_argument("--restart", action="store_true", help=restart)
    sub = add_verb(
        "check", experiment_verbs.run_check, "validate configuration, data and prompts before anything costs money"
    )
    sub.add_argument("--engine", action="store_true", help="also compare vLLM with transformers on a few samples")
    sub = add_verb(
        "plan", cache_verbs.run_plan, "parts, bytes and hours of the dump, estimated from a few hundred samples"
    )
    sub.add_argument("--samples", type=int, default=256, metavar="N", help="samples to estimate from (256)")
    sub.add_argument("--json", action="store_true", help="print the forecast as one JSON object")
    sub.add_argument(
        "--hardware", metavar="NAMExN", help="estimate all stages from published sizes instead, such as h100x8"
    )
    sub.add_argument("--price-per-gpu-hour", type=float, metavar="PRICE", help="with --hardware: money, too")
    for kind in ("question", "response", "caption"):
        sub.add_argument(f"--{kind}-tokens", type=int, metavar="N", help="with --hardware: mean tokens of a sample's")
    sub = add_verb("dump", cache_verbs.run_dump, "run the teacher once and write the cache")
    sub.add_argument("--retry-errors", action="store_true", help="try samples again that failed before")
    sub.add_argument("--cache", metavar="NAME", help="write this one of more_caches instead of the main cache")
    sub = add_verb("verify", cache_verbs.run_verify, "full scan of a cache: checksums, bounds, counts", file=False)
    sub.add_argument("cache", help="a folder, or s3://bucket/prefix")
    sub.add_argument(
        "words", nargs="*", metavar="FILE | section.field=value", help=f"of --replay; default {DEFAULT_FILE}"
    )
    sub.add_argument("--json", action="store_true", help="print the report as one JSON object")
    sub.add_argument("--replay", type=int, metavar="N", help="score N random samples again with the teacher of FILE")
    sub.add_argument("--seed", type=int, default=0, help="seed that draws those samples")
    sub.set_defaults(takes_file=True)
    sub = add_verb(
        "inspect", cache_verbs.run_inspect, "what is in a cache, and the teacher's signals of a sample", file=False
    )
    sub.add_argument("cache", help="a folder, or s3://bucket/prefix")
    sub.add_argument("--sample", action="append", default=[], metavar="ID", help="show this sample; may be repeated")
    sub.add_argument("--html", type=Path, metavar="OUT", help="write a page; without --sample an overview")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the teacher's folder, if it is there")
    sub.add_argument("--images", type=Path, metavar="DIR", help="default: the image root that the cache names")
    sub.add_argument("--json", action="store_true", help="print everything as one JSON object")
    sub = add_verb("train", experiment_verbs.run_train, "train one stage under torchrun")
    sub.add_argument("--stage", required=True)
    sub.add_argument("--again", action="store_true", help="train a finished stage again and replace its result")
    sub.add_argument("--restart", action="store_true", help="discard the state of an unfinished training")
    sub = add_verb("evaluate", model_verbs.run_evaluate, "accuracy of a model, and its fidelity to the cached teacher")
    sub.add_argument("--model", type=Path, required=True, metavar="DIR")
    sub = add_verb("ask", model_verbs.run_ask, "ask any teacher or student about an image", file=False)
    sub.add_argument("--model", type=Path, required=True, metavar="DIR")
    sub.add_argument("--image", type=Path, required=True, metavar="FILE")
    sub.add_argument("--max-new-tokens", type=int, default=64)
    sub.add_argument("question")
    sub = add_verb("ablate", experiment_verbs.run_ablate, "the ablation grid over one cache")
    sub.add_argument("--restart", action="store_true", help=restart)
    sub = add_verb(
        "report",
        experiment_verbs.run_report,
        "report.json and report.html of a run; several runs are compared",
        file=False,
    )
    sub.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="a run's folder, such as runs/digits")
    sub.add_argument(
        "--output",
        dest="page",
        type=Path,
        metavar="FILE",
        help="of a comparison (comparison.html beside the first DIR)",
    )
    sub = add_verb(
        "convert", model_verbs.run_convert, "a checkpoint in another format into one of transformers", file=False
    )
    sub.add_argument("source", type=Path, metavar="SOURCE", help="its folder, or a .gguf file")
    sub.add_argument("target", type=Path, metavar="TARGET", help="a folder that does not exist")
    sub.add_argument("--vision-tower", type=Path, metavar="DIR", help="of a source that only names its tower")
    sub.add_argument("--base", type=Path, metavar="DIR", help="the decoder of a lone mm_projector.bin")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="one with the source's vocabulary")
    sub.add_argument("--template", metavar="NAME", help="the chat template that the model was trained with")
    sub.add_argument("--dtype", default="float32", help="of a GGUF file's weights (float32)")
    return parser


def parse_overrides(arguments: argparse.Namespace, rest: list[str]) -> None:
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
