"""Pairs runs with their controls: differences of a measure by seed and by question, for comparisons.py.

Exact match is a mean over questions, so a question's difference is 1, 0 or -1. KL and cross-entropy are means over rows
(tokens), of which a question has more or fewer. Let D be a question's difference of sums, n its rows, n' the mean of n
over questions, and R = sum D / sum n the difference of the means, over all seeds. The question then counts as
R + (D - n R) / n': the mean over questions is the difference of the means over rows again, for each seed too, and its
variance is that of a ratio of two sums of random questions. (D / n' alone has the same mean, but would vary with the
lengths of questions even where all rows differ equally.) Source: Cochran, "Sampling Techniques", 6.3-6.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Entry = Mapping[str, Any]  # the results of a run and seed
Question = tuple[str, int]  # sample and turn
_SUMS = {"kl_to_teacher": ("kl_sum", "num_rows"), "cross_entropy": ("cross_entropy_sum", "num_labels")}


def pair_runs(
    by_name: Mapping[str, Sequence[Entry]], controls: Mapping[str, Sequence[str]], metric: str
) -> dict[tuple[str, str], NDArray[np.float64]]:
    """A metric's differences (s, q) of each run to each control that has the metric and a seed in common with it."""
    pairs = {}
    for name, others in controls.items():
        for control in others:
            partners = {entry["seed"]: entry for entry in by_name[control]}
            both = [(entry, partners[entry["seed"]]) for entry in by_name[name] if entry["seed"] in partners]
            if both and all(entry.get(metric) is not None for pair in both for entry in pair):
                pairs[name, control] = subtract_controls(both, metric)
    return pairs


def subtract_controls(both: Sequence[tuple[Entry, Entry]], metric: str) -> NDArray[np.float64]:
    """Differences (s, q) of (run, control) of each seed: by question if all answered the same ones, else (s, 1)."""
    if metric == "exact_match":
        answers = [[_list_answers(entry) for entry in pair] for pair in both]
        questions = answers[0][0].keys()
        if questions and all(each.keys() == questions for pair in answers for each in pair):
            return np.array([[float(run[at]) - float(control[at]) for at in questions] for run, control in answers])
    if metric in _SUMS:
        sums = [[_list_sums(entry, metric) for entry in pair] for pair in both]
        samples = {name: num_rows for name, (_, num_rows) in sums[0][0].items()}
        if samples and all(_count_rows(each) == samples for pair in sums for each in pair):
            differences = [[run[name][0] - control[name][0] for name in samples] for run, control in sums]
            return weigh_by_rows(np.array(differences), np.array(list(samples.values()), np.float64))
    return np.array([[run[metric] - control[metric]] for run, control in both])


def weigh_by_rows(differences: NDArray[np.float64], num_rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values (s, q) whose means are those over rows, from differences of sums (s, q) and rows (q,); see the file."""
    overall = differences.sum() / (len(differences) * num_rows.sum())
    return overall + (differences - num_rows * overall) / num_rows.mean()


def _list_answers(entry: Entry) -> dict[Question, bool]:
    return {(sample["sample_id"], sample.get("turn", 0)): sample["correct"] for sample in entry.get("samples", [])}


def _list_sums(entry: Entry, metric: str) -> dict[str, tuple[float, int]]:
    """Sum and number of rows by sample; empty for an evaluation of an earlier version."""
    total, count = _SUMS[metric]
    samples = entry.get("fidelity_by_sample", [])
    return {each["sample_id"]: (each[total], each[count]) for each in samples if each.get(count)}


def _count_rows(sums: Mapping[str, tuple[float, int]]) -> dict[str, int]:
    return {name: num_rows for name, (_, num_rows) in sums.items()}
