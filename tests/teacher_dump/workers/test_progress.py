from __future__ import annotations

from storage.records.records import SampleError
from teacher_dump.workers.progress import DumpSummary, Progress, count_error_kinds
from teacher_dump.workers.worker import PartOutcome


def outcome(part: int, **fields: float) -> PartOutcome:
    given = {
        "num_samples": 2, "num_errors": 0, "num_tokens": 0, "num_bytes": 0,
        "started": 0.0, "finished": 1.0, "peak_memory_bytes": 0,
    }  # fmt: skip
    return PartOutcome(part, **{**given, **fields})  # type: ignore[arg-type]


def test_tokens_a_second_are_over_the_scoring_phase() -> None:
    progress = Progress(num_samples_planned=8, num_parts_planned=4)
    assert (progress.seconds, progress.tokens_per_s, progress.seconds_left) == (0, 0, None)
    progress.add(outcome(0, num_tokens=600, num_bytes=10, started=10.0, finished=12.0, peak_memory_bytes=70))
    assert (progress.tokens_per_s, progress.seconds_left) == (300.0, 6.0)
    progress.add(outcome(3, num_errors=1, num_cut=3, num_tokens=400, num_bytes=2, started=11.0, finished=15.0))
    assert progress.seconds_left == 5.0
    errors = [SampleError("a", "x.jsonl:3: is empty")]
    assert progress.summary(errors) == DumpSummary(4, 2, 1000, 12, 5.0, 200.0, 1, 70, 3, {"is empty": 1})
    assert progress.line() == "2/4 parts, 200 tokens/s, 12.0B, 1 errors, 00:05 left"


def test_reasons_of_one_kind_are_counted_together() -> None:
    reasons = [
        "data/train.jsonl:17: image 'a.png' is missing in /data/images",
        "data/train.jsonl[4]: image 'b c.png' is missing in /other/images",
        "has 2,100 tokens, 576 of them visual; teacher.max_length allows 2048",
        "image 'c.png': cannot identify image file",
        "has 3000 tokens, 1152 of them visual; teacher.max_length allows 2048",
        'data/train.jsonl:18: image "it\'s.png" is missing in /data/images',
    ]
    assert count_error_kinds(SampleError(str(n), reason) for n, reason in enumerate(reasons)) == {
        "image … is missing in …": 3,
        "has … tokens, … of them visual; teacher.max_length allows …": 2,
        "image …: cannot identify image file": 1,
    }
    assert count_error_kinds([]) == {}
