"""The verbs of one model: evaluate, ask, convert."""

from __future__ import annotations

import argparse

from stillhouse.verbs.folder_check import check_folder
from storage.errors import ConfigError


def run_evaluate(arguments: argparse.Namespace) -> None:
    """`stillhouse evaluate`."""
    from stillhouse.config import read_experiment  # torch, Ray
    from stillhouse.reporting.summary import describe_evaluation
    from stillhouse.run import evaluate_model

    check_folder(arguments.model, "--model")
    print(describe_evaluation(evaluate_model(read_experiment(arguments.file, arguments.overrides), arguments.model)))


def run_ask(arguments: argparse.Namespace) -> None:
    """`stillhouse ask`."""
    from student_train.evaluation.ask import answer_question  # torch, transformers

    check_folder(arguments.model, "--model")
    if not arguments.image.is_file():
        raise ConfigError(f"--image {arguments.image} is not a file")
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {arguments.max_new_tokens}, expected at least 1")
    if not arguments.question.strip() or "\ufffd" in arguments.question.encode(errors="replace").decode():
        raise ConfigError("the question is empty or not UTF-8")
    print(
        answer_question(arguments.model, arguments.image, arguments.question, max_new_tokens=arguments.max_new_tokens)
    )


def run_convert(arguments: argparse.Namespace) -> None:
    """`stillhouse convert`."""
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
