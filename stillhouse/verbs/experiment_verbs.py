"""The verbs of a whole experiment: run, check, train, ablate, report."""

from __future__ import annotations

import argparse
from functools import partial

from storage.errors import ConfigError


def run_run(arguments: argparse.Namespace) -> None:
    """`stillhouse run`."""
    from stillhouse.config import read_experiment  # torch, matplotlib, Ray
    from stillhouse.reporting.summary import print_summary
    from stillhouse.run import run_experiment

    page = run_experiment(read_experiment(arguments.file, arguments.overrides), restart=arguments.restart)
    print_summary(page.parent)


def run_check(arguments: argparse.Namespace) -> None:
    """`stillhouse check`."""
    from stillhouse.check import check_engine_outputs, check_experiment  # torch, transformers, Ray
    from stillhouse.config import read_experiment

    experiment = read_experiment(arguments.file, arguments.overrides)
    for line in check_experiment(experiment):
        print(line)
    if arguments.engine:
        check_engine_outputs(experiment, notify=partial(print, flush=True))


def run_train(arguments: argparse.Namespace) -> None:
    """`stillhouse train`."""
    from stillhouse.config import read_experiment  # torch, Ray
    from stillhouse.preflight import check_stage_inputs
    from stillhouse.run import train_stage
    from stillhouse.torchrun import make_training_flags

    experiment = read_experiment(arguments.file, arguments.overrides)
    check_stage_inputs(experiment, arguments.stage)
    flags = make_training_flags(again=arguments.again, restart=arguments.restart, if_changed=False)
    train_stage(experiment, arguments.stage, flags=flags)


def run_ablate(arguments: argparse.Namespace) -> None:
    """`stillhouse ablate`."""
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


def run_report(arguments: argparse.Namespace) -> None:
    """`stillhouse report`."""
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
