"""Tables and figures of results are what the committed reports say."""

from __future__ import annotations

import re

import pytest

from docs.make_tables import (
    FIGURES,
    PAGES,
    REPORTS,
    list_outputs,
    main,
    make_figure,
    make_page,
    make_table,
    read_report,
)

NAMES = sorted(path.stem for path in REPORTS.glob("*.json"))
REPORT = {
    "name": "digits",
    "teacher": {"exact_match": 0.9, "kl_to_teacher": 0.0, "by_category": {"sum": {"exact_match": 0.5}}},
    "runs": [
        {
            "name": "sft",
            "steps": 1200,
            "distilled": False,
            "num_seeds": 2,
            "exact_match": {"mean": 0.5, "sd": 0.015},
            "kl_to_teacher": {"mean": 0.25, "sd": None},
            "seconds": 26.4,
            "by_category": {"sum": {"mean": 0.125, "sd": 0.01}},
        }
    ],
    "verdicts": [
        {"run": "kd", "control": "sft", "metric": metric, "difference": mean, "low": low, "high": high, "adjusted_p": p}
        for metric, mean, low, high, p in (
            ("exact_match", 0.1, -0.05, 0.25, 0.0312),
            ("kl_to_teacher", -0.1, None, None, None),
        )
    ],
}


def test_the_committed_pages_and_figures_are_what_the_reports_say() -> None:
    outputs = list_outputs()
    assert set(FIGURES.values()) | set(PAGES) == set(outputs)
    for path, text in outputs.items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run `python -m docs.make_tables`"
    assert main(["--check"]) == 0
    assert main(["nonsense"]) == 2


def test_every_committed_report_is_shown() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    shown = {name for text in texts for names in re.findall(r"<!-- table: (\S+) ", text) for name in names.split(",")}
    assert shown == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_report_names_no_folder_of_a_machine(name: str) -> None:
    text = (REPORTS / f"{name}.json").read_text(encoding="utf-8")
    assert not re.findall(r'"(?:/|~)[^"]*"', text)
    assert read_report(name)["name"] == name


def test_tables_by_hand() -> None:
    assert make_table([REPORT], "short").splitlines()[2:] == [
        "| `sft` | labels only | 50.0 ± 1.5 | 0.250 |",
        "| *teacher* |  | 90.0 | 0.000 |",
    ]
    assert "| 1,200 |" in make_table([REPORT], "runs")
    assert make_table([REPORT], "categories").splitlines()[2:] == ["| `sft` | 12.5 ± 1.0 |", "| *teacher* | 50.0 |"]
    assert make_table([REPORT], "differences").splitlines()[2:] == [
        "| `kd` | `sft` | +10.0 (−5.0 to +25.0) | .031 | −0.100 |",
    ]


def test_a_table_of_two_reports_has_the_teacher_once() -> None:
    other = {**REPORT, "name": "digits_clean", "runs": [{**REPORT["runs"][0], "name": "kd_clean"}]}
    names = [line.split(" |")[0] for line in make_table([REPORT, other], "short").splitlines()[2:]]
    assert names == ["| `sft`", "| `kd_clean`", "| *teacher*"]


def test_the_figure_has_every_run_and_the_teacher() -> None:
    figure = make_figure(REPORT)
    assert "sft: 50.0 % ± 1.5" in figure
    assert "teacher 90.0" in figure


def test_a_changed_number_is_found() -> None:
    page = PAGES[1].read_text(encoding="utf-8")
    changed = re.sub(
        r"(<!-- table: digits,digits_clean runs -->\n(?:.*\n){2}.*?\d)(\d\.\d)", r"\g<1>9\2", page, count=1
    )
    assert changed != page
    assert make_page(changed) == page
