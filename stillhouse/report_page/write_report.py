"""Writes report.json and report.html of an experiment."""

from __future__ import annotations

from pathlib import Path

from stillhouse.report_page.page import build_page_details, render_report
from stillhouse.reporting.report import summarise
from stillhouse.reporting.results import read_metrics, read_results
from storage.backends.folder import write_atomically, write_json


def write_report(folder: Path) -> Path:
    """Writes <folder>/report.json and report.html and returns the latter's path."""
    results = read_results(folder)
    report = summarise(results)
    write_json(folder / "report.json", report)
    metrics = {
        f"{name}/seed{seed['seed']}": read_metrics(Path(entry["folder"]))
        for name, seeds in results.runs.items()
        for seed in seeds
        for entry in results.listing["runs"]
        if (entry["name"], entry["seed"]) == (name, seed["seed"])
    }
    page = folder / "report.html"
    write_atomically(page, render_report(report, metrics, build_page_details(results, report)).encode())
    return page
