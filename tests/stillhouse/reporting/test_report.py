"""The report's arithmetic by hand, and its sentence both ways."""

import dataclasses
import json
from pathlib import Path

import pytest

from stillhouse.report_page.page import render_report
from stillhouse.reporting.comparisons import Comparison
from stillhouse.reporting.plots import draw_categories
from stillhouse.reporting.report import build_report
from stillhouse.reporting.results import read_metrics
from stillhouse.reporting.summary import describe_evaluation
from stillhouse.reporting.text_formats import compute_mean_and_sd, format_number, format_percent
from stillhouse.reporting.verdict import describe_scope, describe_verdict
from storage.backends.disk import format_bytes
from storage.errors import StillhouseError
from tests.stillhouse.reporting.reports import write_experiment


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
    assert describe_verdict(runs, wins[:1]) == "kd beats sft by 9.8 points (95 % interval 6.2 to 13.4, 3 seeds)."
    assert describe_verdict(runs, wins).startswith("kd beats sft, the best of 2 controls, by 9.8 points")
    unsure = describe_verdict(runs, [compare("kd", 0.01, 0.05)])
    assert unsure == (
        "That kd beats sft is not shown: +1.0 points (95 % interval -4.0 to 6.0, 3 seeds; would need about 11 seeds)."
    )
    worse = describe_verdict(runs, [compare("kd", -0.1, 0.05)])
    assert worse.startswith("kd falls behind sft by 10.0 points (95 % interval 5.0 to 15.0, 3 seeds).")
    assert "nothing to compare" in describe_verdict(runs, [])
    assert "nothing to compare" in describe_verdict(runs[:1], [compare("sft", 0.1, 0.05)])
    once = dataclasses.replace(wins[0], low=None, high=None, shown=False, num_seeds=1, seeds_needed=None)
    assert "(one seed has no interval; take several seeds)." in describe_verdict(runs, [once])
    many = dataclasses.replace(wins[0], shown=False, seeds_needed=None)
    assert "more questions, not seeds, would show" in describe_verdict(runs, [many])


def test_the_verdict_is_about_the_most_accurate_distilled_run() -> None:
    runs = [run("kd", distilled=True), {**run("kd_full", distilled=True), "exact_match": {"mean": 0.7, "sd": 0.1}}]
    found = [compare("kd", 0.1, 0.05), compare("kd_full", 0.3, 0.05)]
    assert describe_verdict(runs, found).startswith("kd_full beats")
    aside = [*found, compare("kd", 0.1, 0.05, control="sft_double")]
    assert describe_verdict(runs, aside).startswith("kd beats")  # the other one has a control of its own


def test_the_verdict_speaks_of_controls_that_are_not_distilled() -> None:
    runs = [run("sft", distilled=False), run("kd_response", distilled=True), run("kd", distilled=True)]
    found = [compare("kd", 0.3, 0.05), compare("kd", 0.1, 0.05, control="kd_response")]
    assert describe_verdict(runs, found) == "kd beats sft by 30.0 points (95 % interval 25.0 to 35.0, 3 seeds)."
    assert describe_verdict(runs, found[1:]).startswith("kd beats kd_response by 10.0 points")  # no other one


def test_a_control_that_is_distilled_does_not_choose_the_verdict_s_run() -> None:
    """kd_and_labels has fewer controls than kd, but as many that are not distilled, and is more accurate."""
    runs = [run(name, distilled=name != "sft") for name in ("sft", "kd_response", "kd", "kd_and_labels")]
    runs[3] = {**runs[3], "exact_match": {"mean": 0.9, "sd": 0.1}}
    found = [compare(name, 0.3, 0.05) for name in ("kd", "kd_and_labels")]
    found.append(compare("kd", 0.1, 0.05, control="kd_response"))
    assert describe_verdict(runs, found).startswith("kd_and_labels beats sft")


def test_the_verdict_names_a_control_over_which_nothing_is_shown() -> None:
    runs = [run("kd", distilled=True)]
    found = [compare("kd", 0.1, 0.02), compare("kd", 0.11, 0.2, control="sft_double")]
    assert describe_verdict(runs, found).startswith("That kd beats sft_double is not shown: +11.0 points")
    found = [compare("kd", -0.3, 0.02, metric="kl_to_teacher"), compare("kd", -0.4, 0.5, metric="kl_to_teacher")]
    assert "not shown to differ" in describe_verdict(runs, [compare("kd", 0.1, 0.02), *found])


def test_the_verdict_says_which_answers_were_judged_and_who_is_closer_to_the_teacher() -> None:
    runs = [{**run("kd", distilled=True), "turns": "all"}]
    for difference, said in (
        (-0.2, "; its KL to the teacher is 0.200 nats lower than that of sft (95 % interval 0.150 to 0.250)."),
        (0.2, "; its KL to the teacher is 0.200 nats higher than that of sft"),
        (-0.02, "not shown to differ from that of sft: -0.020 nats (95 % interval -0.070 to 0.030; would need"),
    ):
        both = [compare("kd", 0.1, 0.05), compare("kd", difference, 0.05, metric="kl_to_teacher")]
        assert said in describe_verdict(runs, both)
        assert describe_verdict(runs, both).count(". ") == 0  # one sentence
    assert "KL" not in describe_verdict(runs, both[:1])
    assert describe_scope(runs) == "Exact match of all answers."


def test_runs_that_were_judged_on_other_samples_are_said_to_be() -> None:
    """A run is judged on the held-out samples of all caches of its stage, which its control may not read."""
    one, other = run("sft", distilled=False), run("kd", distilled=True)
    assert "other samples" not in describe_scope([{**each, "num_held_out": 24} for each in (one, other)])
    said = describe_scope([{**one, "num_held_out": 24}, {**other, "num_held_out": 34}])
    assert said.endswith("judged on other samples; numbers of samples: sft 24, kd 34.")


def test_sizes_are_decimal():
    assert [format_bytes(size) for size in (999, 1000, 1.5e6, 2e12)] == ["999 B", "1.0 kB", "1.5 MB", "2.0 TB"]


def test_claims_and_routers_of_a_grid_are_reported(tmp_path: Path) -> None:
    def judge(claims: float, load: list[list[float]] | None) -> dict:
        scores = {"num": 9, "accuracy": 0.6, "hallucination_rate": claims, "yes_ratio": 0.5, "recall": 0.7}
        routers = load and {"num_tokens": 5, "load": load, "entropy": 1.2, "balance": 1.1, "z": 2.0, "dropped": 0}
        return {"yes_no": scores, "unsupported_rate": 2 * claims, "routers": routers, "samples": []}

    loads = [[0.1, 0.6, 0.3]], [[0.4, 0.4, 0.2]]
    sparse_run = {
        "evaluation": judge(0.1, loads[0]),
        "summary": {"num_activated_parameters": 7},
        "final": {"preference": 0.5},
    }
    runs = {"sparse": sparse_run, "dense": {"evaluation": judge(0.3, None)}}
    write_experiment(tmp_path, runs, controls={"sparse": ["dense"]})
    for name, evaluation in (("sparse", judge(0.1, loads[1])), ("dense", judge(0.4, None))):
        path = tmp_path / "models" / name / "seed1" / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | evaluation))
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
    page = render_report(report, {})
    assert "50.0 · 35.0 · 15.0" in page
    assert '<section id="routers">' in page
    assert "<td>20.0 ± 0.0 %</td>" in page  # sparse's answers with words without support, and how many fewer:
    assert page.split("Words without support, points")[1].split("</details>")[0].count("<td>-50.0</td>") == 1
    plain = [{**each, "unsupported_rate": None, "yes_no": None, "routers": None} for each in report["runs"]]
    page = render_report({**report, "runs": plain}, {})
    assert not any(words in page for words in ("Words without support", "Yes/no questions", '<section id="routers">'))


def test_kl_is_paired_by_question_where_evaluations_keep_its_sums(tmp_path: Path) -> None:
    runs = {"kd": {"kl": 0.1, "final": {"response": 1.0}}, "sft": {"kl": 0.3}}
    now = write_experiment(tmp_path / "now", runs, controls={"kd": ["sft"]})
    before = write_experiment(tmp_path / "before", runs, controls={"kd": ["sft"]}, earlier=True)
    for folder, num_questions in ((now, 2), (before, 1)):
        found = {each["metric"]: each for each in build_report(folder)["verdicts"]}
        for metric in ("kl_to_teacher", "cross_entropy"):
            assert found[metric]["difference"] == pytest.approx(-0.2)
            assert found[metric]["num_questions"] == num_questions


def test_bulk_of_samples_stays_out_of_the_report(tmp_path: Path) -> None:
    samples = [(f"sample-{number}", "place") for number in range(200)]
    report = build_report(write_experiment(tmp_path, {"kd": {}}, controls={}, samples=samples))
    text = json.dumps(report)
    assert "sample-7" not in text
    assert "fidelity_by_sample" not in text


def test_samples_without_a_category_have_a_name_in_every_table(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({
        "exact_match": 0.5, "by_category": {"": {"exact_match": 0.25}, "sum": {"exact_match": 0.75}},
        "kl_to_teacher": None,
    }))  # fmt: skip
    assert "no category  25.0 %" in " ".join(describe_evaluation(path).split("\n"))
    runs = [{**run("sft", distilled=False), "by_category": {"": {"mean": 0.5, "sd": 0.1}}}]
    assert "no category" in (draw_categories(runs) or "")
    report = build_report(write_experiment(tmp_path / "run", {"sft": {}}, controls={}, samples=[("s0", "")]))
    assert "<th>no category</th>" in render_report(report, {})


def test_a_category_that_looks_like_a_formula_is_drawn_as_it_is() -> None:
    runs = [{**run("sft", distilled=False), "by_category": {"$\\frac$ & x": {"mean": 0.5, "sd": 0.1}}}]
    assert "$\\frac$ &amp; x" in (draw_categories(runs) or "")


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
