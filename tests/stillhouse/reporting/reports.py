"""Small experiments on disk: the files that finished runs leave, without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = 4  # of each sample


def write_experiment(
    folder: Path,
    runs: Mapping[str, Mapping[str, Any]],
    *,
    controls: Mapping[str, Sequence[str]],
    cache: Path | None = None,
    samples: Sequence[tuple[str, str]] = (("s0", "place"), ("s1", "place")),
    earlier: bool = False,
    **listing: Any,
) -> Path:
    """Writes two seeds of each run. A run's values: kl (nats a row), wrong (sample ids), evaluation, summary.

    `samples`: id and category. `earlier`: evaluations as a former version wrote them, without sums of samples.
    """
    entries = []
    for name, run in runs.items():
        for seed in (0, 1):
            path = folder / "models" / name / f"seed{seed}"
            path.mkdir(parents=True)
            (path / "evaluation.json").write_text(json.dumps(make_evaluation(run, samples, cache, earlier=earlier)))
            summary = {
                "steps": 3, "num_parameters": 10, "seconds": 1.0, "peak_memory_bytes": 1, "num_samples_trained": 6,
                "final": run.get("final", {"cross_entropy": 1.0}), **run.get("summary", {}),
            }  # fmt: skip
            (path / "summary.json").write_text(json.dumps(summary))
            (path / "inputs.json").write_text(json.dumps(run.get("inputs", {})))
            (path / "metrics.jsonl").write_text('{"step": 1, "cross_entropy": 2.0}\n')
            entries.append({"name": name, "stage": "s", "seed": seed, "folder": str(path)})
            if cache is not None and not earlier:
                entries[-1]["caches"] = [str(cache)]
    document = {"runs": entries, "controls": controls, "cache": None if cache is None else str(cache), **listing}
    (folder / "ablations.json").write_text(json.dumps(document))
    return folder


def make_evaluation(
    run: Mapping[str, Any], samples: Sequence[tuple[str, str]], cache: Path | None, *, earlier: bool
) -> dict[str, Any]:
    """An evaluation.json of a run that answers all `samples` rightly but those in its `wrong`."""
    wrong, kl = run.get("wrong", ()), run.get("kl", 0.5)
    answers = [
        {"sample_id": name, "turn": 0, "category": category, "answer": "no <b>" if name in wrong else "yes",
         "reference": "yes", "correct": name not in wrong}
        for name, category in samples
    ]  # fmt: skip
    by_category = {
        category: {"num": 1, "exact_match": 0.5} | ({} if earlier else {"kl_to_teacher": kl, "cross_entropy": kl})
        for _, category in samples
    }
    document = {
        "num_samples": len(samples), "turns": "all", "num_answers": len(samples), "by_category": by_category,
        "exact_match": sum(each["correct"] for each in answers) / max(1, len(answers)), "kl_to_teacher": kl,
        "cross_entropy": kl, "top1_agreement": 0.5, "unsupported_rate": None, "yes_no": None, "routers": None,
        "samples": answers, **run.get("evaluation", {}),
    }  # fmt: skip
    if earlier:
        return document
    sums = [
        {"sample_id": name, "num_labels": ROWS, "cross_entropy_sum": ROWS * kl, "num_rows": ROWS,
         "kl_sum": ROWS * kl * (1.5 if number % 2 else 0.5)}
        for number, (name, _) in enumerate(samples)
    ]  # fmt: skip
    relations = run.get("relations", [])
    caches = {} if cache is None else {"caches": [str(cache)]}
    return {**document, "fidelity_by_sample": sums, "versions": {"torch": "9.9"}, "relations": relations, **caches}
