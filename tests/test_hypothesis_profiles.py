"""The test command draws the same examples in every run; `fresh` draws new and more ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.hypothesis_profiles import FRESH_FACTOR

REPOSITORY = Path(__file__).parents[1]
TESTS = """
import json
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hypothesis_profiles import examples, register_profiles
drawn = []

@settings(max_examples=examples(10))
@given(st.integers(0, 2**60))
def test_draw(number):
    drawn.append(number)

def test_write(request):
    path = request.config.rootpath / "drawn.json"
    path.write_text(json.dumps(drawn))
"""


def drawn(folder: Path, *arguments: str) -> list[int]:
    """What a test with ten examples draws when pytest runs it in a process of its own."""
    folder.joinpath("pytest.ini").write_text("[pytest]\n")
    folder.joinpath("conftest.py").write_bytes((REPOSITORY / "tests" / "conftest.py").read_bytes())
    folder.joinpath("test_drawn.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, str(folder)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(folder.joinpath("drawn.json").read_text())


def test_the_fixed_profile_draws_the_same_in_every_run(tmp_path: Path) -> None:
    first = drawn(tmp_path)
    assert len(first) == 10
    assert drawn(tmp_path) == first


def test_the_fresh_profile_draws_anew_and_more(tmp_path: Path) -> None:
    first, second = (drawn(tmp_path, "--hypothesis-profile=fresh") for _ in range(2))
    assert len(first) == len(second) == 10 * FRESH_FACTOR
    assert set(first) != set(second)
