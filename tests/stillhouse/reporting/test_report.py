"""The report's arithmetic by hand, its sentence both ways, and its page against hostile text."""

import dataclasses
import json
from pathlib import Path

import pytest

from stillhouse.reporting.comparisons import Comparison
from stillhouse.reporting.plots import draw_categories
from stillhouse.reporting.report import build_report, read_metrics, render_report
from stillhouse.reporting.summary import describe_evaluation
from stillhouse.reporting.text_formats import compute_mean_and_sd, format_number, format_percent
from stillhouse.reporting.verdict import describe_verdict
from storage.backends.disk import format_bytes
from storage.errors import StillhouseError


def run(name: str, *, distilled: bool) -> dict:
    return {
        "name": name,
        "stage": "dft",
        "distilled": distilled,
        "steps": 3,
        "seeds": [0, 1],
        "num_seeds": 2,
        "num_parameters": 10,
        "num_activated_parameters": 10,
        "exact_match": {"mean": 0.5, "sd": 0.1},
        "exact_match_by_seed": {"0": 0.4, "1": 0.6},
        "by_category": {"place": {"mean": 0.5, "sd": 0.1}},
        "cross_entropy": None,
        "kl_to_teacher": None,
        "top1_agreement": None,
        "unsupported_rate": None,
        "yes_no": None,
        "routers": None,
        "seconds": 1.0,
        "peak_memory_bytes": 1,
    }


def compare(
    run: str, difference: float, half: float, *, metric: str = "exact_match", control: str = "sft"
) -> Comparison:
    return Comparison(
        run, control, metric, difference, difference - half, difference + half, adjusted_p=0.01, num_seeds=3,
        num_questions=9, shown=abs(difference) > half, smallest=half, seeds_needed=11,
    )  # fmt: skip


def test_spread_of_one_seed() -> None:
    assert compute_mean_and_sd([0.3]) == {"mean": 0.3, "sd": None}
    assert format_percent(compute_mean_and_sd([0.3])) == "30.0 %"
    assert format_number(compute_mean_and_sd([0.3]), ".2f") == "0.30"


def test_the_verdict_is_one_honest_sentence_either_way() -> None:
    runs = [run("sft", distilled=False), run("kd", distilled=True)]
    wins = [compare("kd", 0.098, 0.036), compare("kd", 0.2, 0.01, control="sft_double")]
    assert describe_verdict(runs, wins[:1]).startswith("kd beats sft by 9.8 points (95 % interval 6.2 to 13.4). Exact")
    assert describe_verdict(runs, wins).startswith("kd beats sft, the best of 2 controls, by 9.8 points")
    unsure = describe_verdict(runs, [compare("kd", 0.01, 0.05)])
    assert unsure.startswith(
        "That kd beats sft is not shown: +1.0 points (95 % interval -4.0 to 6.0); would need about 11 seeds."
    )
    worse = describe_verdict(runs, [compare("kd", -0.1, 0.05)])
    assert worse.startswith("kd falls behind sft by 10.0 points (95 % interval 5.0 to 15.0).")
    assert "nothing to compare" in describe_verdict(runs, [])
    assert "nothing to compare" in describe_verdict(runs[:1], [compare("sft", 0.1, 0.05)])
    once = dataclasses.replace(wins[0], low=None, high=None, shown=False, num_seeds=1, seeds_needed=None)
    assert "(one seed has no interval); take several seeds." in describe_verdict(runs, [once])


def test_the_verdict_is_about_the_most_accurate_distilled_run() -> None:
    runs = [run("kd", distilled=True), {**run("kd_full", distilled=True), "exact_match": {"mean": 0.7, "sd": 0.1}}]
    found = [compare("kd", 0.1, 0.05), compare("kd_full", 0.3, 0.05)]
    assert describe_verdict(runs, found).startswith("kd_full beats")
    aside = [*found, compare("kd", 0.1, 0.05, control="sft_double")]
    assert describe_verdict(runs, aside).startswith("kd beats")  # the other one has a control of its own


def test_the_verdict_says_which_answers_were_judged_and_who_is_closer_to_the_teacher() -> None:
    runs = [{**run("kd", distilled=True), "turns": "all"}]
    for difference, said in (
        (-0.2, "Its KL to the teacher is 0.200 nats lower than that of sft (95 % interval 0.150 to 0.250)."),
        (0.2, "Its KL to the teacher is 0.200 nats higher than that of sft"),
        (-0.02, "not shown to differ from that of sft: -0.020 nats (95 % interval -0.070 to 0.030); would need"),
    ):
        both = [compare("kd", 0.1, 0.05), compare("kd", difference, 0.05, metric="kl_to_teacher")]
        assert said in describe_verdict(runs, both)
        assert "Exact match of all answers." in describe_verdict(runs, both)
    assert "KL" not in describe_verdict(runs, both[:1])


def test_runs_that_were_judged_on_other_samples_are_said_to_be() -> None:
    """A run is judged on the held-out samples of all caches of its stage, which its control may not read."""
    one, other, found = run("sft", distilled=False), run("kd", distilled=True), [compare("kd", 0.1, 0.05)]
    assert "other samples" not in describe_verdict([{**each, "num_held_out": 24} for each in (one, other)], found)
    said = describe_verdict([{**one, "num_held_out": 24}, {**other, "num_held_out": 34}], found)
    assert said.endswith("judged on other samples; numbers of samples: sft 24, kd 34.")


def test_page_escapes_text_from_data():
    hostile = "<script>alert(1)</script>"
    report = {
        "name": hostile,
        "machine": hostile,
        "teacher": {},
        "cache": {},
        "dump": {},
        "runs": [run(hostile, distilled=False)],
        "verdict": hostile,
        "verdicts": [dataclasses.asdict(compare(hostile, 0.1, 0.05, control=hostile))],
        "cost": {},
        "cost_sentence": hostile,
    }
    page = render_report(report, {f"{hostile}/seed{seed}": [{"step": 1, "cross_entropy": 2.0}] for seed in (0, 1)})
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_sizes_are_decimal():
    assert [format_bytes(size) for size in (999, 1000, 1.5e6, 2e12)] == ["999 B", "1.0 kB", "1.5 MB", "2.0 TB"]


def write_run(folder: Path, *, seed: int, claims: float, load: list[list[float]] | None) -> dict:
    """A finished run's two files, and its entry in ablations.json."""
    folder.mkdir(parents=True)
    summary = {
        "steps": 3, "num_parameters": 10, "num_activated_parameters": 7 if load else 10, "seconds": 1.0,
        "peak_memory_bytes": 1, "final": {"preference": 0.5} if load else {"cross_entropy": 1.0},
    }  # fmt: skip
    evaluation = {
        "exact_match": 0.5, "by_category": {"<b>": {"num": 1, "exact_match": 0.5}}, "kl_to_teacher": None,
        "top1_agreement": None, "seconds": 9.0, "unsupported_rate": 2 * claims,
        "yes_no": {"num": 9, "accuracy": 0.6, "hallucination_rate": claims, "yes_ratio": 0.5, "recall": 0.7},
        "routers": None if load is None
        else {"num_tokens": 5, "load": load, "entropy": 1.2, "balance": 1.1, "z": 2.0, "dropped": 0},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return {"name": folder.parent.name, "stage": "s", "seed": seed, "folder": str(folder)}


def test_claims_and_routers_of_a_grid_are_reported(tmp_path: Path):
    loads = [[0.1, 0.6, 0.3]], [[0.4, 0.4, 0.2]]
    entries = [
        write_run(tmp_path / "sparse" / f"seed{seed}", seed=seed, claims=0.1, load=loads[seed]) for seed in (0, 1)
    ]
    entries += [
        write_run(tmp_path / "dense" / f"seed{seed}", seed=seed, claims=0.3 + 0.1 * seed, load=None) for seed in (0, 1)
    ]
    listing = {"runs": entries, "controls": {"sparse": ["dense"]}}
    (tmp_path / "ablations.json").write_text(json.dumps(listing))
    report = build_report(tmp_path)
    sparse, dense = report["runs"]
    assert sparse["distilled"]
    assert (sparse["num_parameters"], sparse["num_activated_parameters"]) == (10, 7)
    assert sparse["routers"]["load"] == [pytest.approx([0.5, 0.35, 0.15])]  # the busiest, whichever number it has
    assert sparse["routers"]["load_by_seed"] == list(loads)
    assert dense["routers"] is None
    found = {each["metric"]: each for each in report["verdicts"]}
    assert found["hallucination_rate"]["difference"] == pytest.approx(0.1 - 0.35)
    assert sparse["unsupported_rate"]["mean"] == pytest.approx(0.2)
    assert found["unsupported_rate"]["difference"] == pytest.approx(2 * (0.1 - 0.35))
    assert found["exact_match"]["num_questions"] == 1  # the files name no questions
    assert "kl_to_teacher" not in found
    page = render_report(report, {f"{name}/seed{seed}": [] for name in ("sparse", "dense") for seed in (0, 1)})
    assert "50.0 · 35.0 · 15.0" in page
    assert "Routers of the sparse students" in page
    assert "<td>20.0 ± 0.0 %</td>" in page  # sparse's answers with words without support, and how many fewer:
    assert page.split("<h2>Words without support")[1].split("<h2>")[0].count("<td>-50.0</td>") == 1
    plain = [{**each, "unsupported_rate": None, "yes_no": None} for each in report["runs"]]
    page = render_report(
        {**report, "runs": plain}, {f"{name}/seed{seed}": [] for name in ("sparse", "dense") for seed in (0, 1)}
    )
    assert "Words without support" not in page
    assert "Yes/no questions" not in page
    assert "<b>" not in page


def test_samples_without_a_category_have_a_name_in_every_table(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({
        "exact_match": 0.5, "by_category": {"": {"exact_match": 0.25}, "sum": {"exact_match": 0.75}},
        "kl_to_teacher": None,
    }))  # fmt: skip
    assert "no category  25.0 %" in " ".join(describe_evaluation(path).split("\n"))
    runs = [{**run("sft", distilled=False), "by_category": {"": {"mean": 0.5, "sd": 0.1}}}]
    report = {
        "name": "",
        "machine": "",
        "teacher": {},
        "cache": {},
        "dump": {},
        "runs": runs,
        "verdict": "",
        "verdicts": [],
        "cost": {},
    }
    assert "<th>no category</th>" in render_report(report, {"sft/seed0": [], "sft/seed1": []})
    assert "no category" in draw_categories(runs)


def test_a_category_that_looks_like_a_formula_is_drawn_as_it_is() -> None:
    runs = [{**run("sft", distilled=False), "by_category": {"$\\frac$ & x": {"mean": 0.5, "sd": 0.1}}}]
    assert "$\\frac$ &amp; x" in draw_categories(runs)


@pytest.mark.parametrize("text", ['{"runs": [', "[]", "null", "{}", "\0\0\0\0"])
def test_a_damaged_list_of_runs_is_named(tmp_path, text):
    (tmp_path / "ablations.json").write_text(text)
    with pytest.raises(StillhouseError, match=r"ablations\.json is damaged: .*; remove it, and run `stillhouse run`"):
        build_report(tmp_path)


def test_a_log_of_steps_that_is_still_written_is_read_as_far_as_it_goes(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    log.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(StillhouseError, match=r"metrics\.jsonl is damaged"):
        read_metrics(tmp_path)
