"""What can be found wrong before anything costs money: no weights are loaded, no teacher is started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Experiment
from storage.errors import CacheError, StillhouseError
from storage.identity import difference
from storage.reader import Cache
from student_train.material import fitting_checkpoint
from student_train.trainer import resolved
from teacher_dump.dump import plan_dump, prompt_errors, read_settings


def check(experiment: Experiment) -> Iterator[str]:
    """Yields one line a finding that is in order; `StillhouseError` at the first that is not."""
    yield f"{experiment.path}: valid"
    settings = read_settings(experiment.path, experiment.overrides)
    planned = plan_dump(settings)
    yield f"samples: {planned.plan.num_samples:,} in {len(planned.plan.parts):,} parts"
    errors = prompt_errors(settings, planned)
    total = planned.plan.num_samples + sum(len(part.errors) for part in planned.plan.parts)
    allowed = experiment.dump.max_error_fraction
    named = "\n  ".join(f"{error.sample_id}: {error.reason}" for error in errors[:10])
    if errors and len(errors) > allowed * total:
        raise StillhouseError(
            f"{len(errors):,} of {total:,} samples cannot be used, dump.max_error_fraction allows "
            f"{allowed:.1%}:\n  {named}"
        )
    yield f"prompts: {len(errors):,} of {total:,} samples cannot be used" + (f":\n  {named}" if errors else "")
    path = Path(experiment.cache.path)
    if not path.exists():
        yield f"cache: none at {path} yet"
        return
    cache = Cache.open(path, families=())
    found = difference(cache.identity, planned.identity)
    if found:
        raise CacheError(f"{path}: another cache lies there; " + "; ".join(found) + "; remove it or set cache.path")
    yield f"cache: {path} fits, {cache.num_samples:,} samples{'' if cache.sealed else ', not sealed yet'}"
    for name, section in experiment.stages.items():
        stage = resolved(section, name)
        if stage.cache is None and Path(stage.init).is_dir():
            fitting_checkpoint(stage, str(path))
            yield f"stages.{name}: {stage.init} fits the cache"
