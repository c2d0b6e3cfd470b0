"""The command line: exit codes, one clear message, no traceback for a user's mistake."""

import pytest

from pipeline.__main__ import main


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "missing.yaml"], "missing.yaml"),
        (["run", "a.yaml", "b.yaml"], "2 files"),
        (["dump", "--fast"], "--fast"),
        (["train", "pipeline.yaml", "--stage", "nothing"], "nothing"),
        (["report", "nowhere"], "ablations.json"),
        (["evaluate", "--model", "nowhere"], "nowhere"),
        (["ask", "--model", "nowhere", "--image", "x.png", "what?"], "nowhere"),
        (["ask", "--model", ".", "--image", "x.png", "what?"], "x.png"),
        (["verify", "nowhere"], "nowhere"),
        (["inspect", "nowhere"], "nowhere"),
        (["inspect", ".", "--samples"], "--samples"),
    ],
)
def test_a_users_mistake_exits_2_with_one_message(argv, words, capsys):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_a_folder_that_is_no_cache_is_a_failure_with_its_path(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "cache.json" in capsys.readouterr().err
