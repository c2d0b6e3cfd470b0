"""`python -m student_train.evaluate FILE --model DIR [section.field=value …]` writes DIR/evaluation.json.

Exit codes: 0 done, 2 the user's mistake, 1 a failure, 130 and 143 after SIGINT and SIGTERM.
"""

from __future__ import annotations

import sys
from pathlib import Path

# `python -m` puts the current folder first, where a user's own storage.py would shadow our package.
if __name__ == "__main__" and not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parent.parent:
    del sys.path[0]

import argparse
import os
from collections.abc import Sequence

from storage.config import CacheSection
from storage.config_loader import read_sections
from storage.entry_point import run_command
from storage.processes.standard_streams import open_closed_streams
from storage.processes.stop_signals import end_process
from student_train.config import EvaluationSection, SourceSection


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate the model that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m student_train.evaluate", description="Evaluate a model.")
    parser.add_argument("file", help="pipeline.yaml")
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it when it is imported, below
    return run_command(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> None:
    schemas = {"cache": CacheSection, "evaluation": EvaluationSection}
    sections = read_sections(options.file, schemas, options.overrides)
    source = SourceSection(path=sections["cache"].path)
    from student_train.evaluation.model_evaluation import evaluate_model

    document = evaluate_model(options.model, [source], sections["evaluation"])
    sys.stdout.write(f"{options.model}: exact match {document['exact_match']:.1%} of {document['num_answers']}\n")


if __name__ == "__main__":
    open_closed_streams()
    end_process(main())
