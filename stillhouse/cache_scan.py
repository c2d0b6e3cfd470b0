"""Scans a cache with a progress bar. Apart from run.py, so that `stillhouse verify` does not load torch and Ray."""

from __future__ import annotations

from tqdm import tqdm

from storage.verify.scan_cache import VerifyReport, verify


def scan_with_progress(path: str) -> VerifyReport:
    """The report of a full scan of the cache, with a progress bar over its bytes."""
    with tqdm(desc="verify", unit="B", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return verify(path, show)
