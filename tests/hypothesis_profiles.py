"""How hypothesis draws: the same examples in every run (`fixed`), or new and more ones (`fresh`).

`make test` uses `fixed`, so that a test command fails for a change and never for chance. `make test-all` passes
`--hypothesis-profile=fresh`; what fails there becomes an `@example` of its test. Neither profile has a limit of
time: a slow machine is no failure.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

FRESH_FACTOR = 5  # examples of `fresh` for each one of `fixed`
_FIXED_EXAMPLES = 100  # of a test that names no number
_PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def register_profiles() -> None:
    """Registers both profiles and loads `fixed`; hypothesis' own pytest option may load another one afterwards."""
    settings.register_profile("fixed", derandomize=True, database=None, max_examples=_FIXED_EXAMPLES, **_PATIENT)
    settings.register_profile(
        "fresh", derandomize=False, database=None, max_examples=_FIXED_EXAMPLES * FRESH_FACTOR, **_PATIENT
    )
    settings.load_profile("fixed")


def examples(count: int) -> int:
    """`count` in the profile `fixed`, FRESH_FACTOR times as many in `fresh`; for `max_examples`."""
    return count * settings().max_examples // _FIXED_EXAMPLES
