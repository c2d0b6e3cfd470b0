"""Publishes the dump's progress as Prometheus metrics, at Ray's endpoint on the node that started the dump."""

from __future__ import annotations

from ray.util.metrics import Gauge

from teacher_dump.workers.progress import Progress

_DESCRIPTIONS = {
    "samples": "Samples with a record, committed by this dump",
    "samples_planned": "Samples that this dump has to score",
    "parts": "Parts committed by this dump",
    "parts_planned": "Parts that this dump has to write",
    "tokens": "Positions that the teacher scored",
    "tokens_per_second": "Positions a second, over all teachers",
    "bytes": "Bytes of the committed parts",
    "errors": "Samples without a record",
    "seconds_left": "Until the last part, at the pace so far",
}


class DumpMetrics:
    """Gauges named `ray_stillhouse_dump_…`, with the run's name as the tag `run`."""

    def __init__(self, run: str) -> None:
        """Registers the gauges; Ray must be connected."""
        self._gauges = {
            name: Gauge(f"stillhouse_dump_{name}", description=text, tag_keys=("run",))
            for name, text in _DESCRIPTIONS.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def show(self, progress: Progress) -> None:
        """Sets every gauge to its current value; Ray collects them every few seconds."""
        values = {
            "samples": progress.num_samples,
            "samples_planned": progress.num_samples_planned,
            "parts": progress.num_parts,
            "parts_planned": progress.num_parts_planned,
            "tokens": progress.num_tokens,
            "tokens_per_second": progress.tokens_per_s,
            "bytes": progress.num_bytes,
            "errors": progress.num_errors,
            "seconds_left": progress.seconds_left or 0.0,
        }
        for name, value in values.items():
            self._gauges[name].set(value)
