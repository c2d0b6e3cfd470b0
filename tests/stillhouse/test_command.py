"""The command line: exit codes, one clear message, no traceback for a user's mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.__main__ import main
from storage.reader.cache import Cache
from storage.writer.cache_writer import CacheWriter
from tests.storage.synthetic_cache import make_identity, make_part, write_cache
from tests.tiny import make_tiny_tokenizer

# A verb whose libraries print, in Python and below it.
NOISY = """
import os, sys
import stillhouse.__main__ as command
parse = command.build_parser
def build_parser():
    parser = parse()
    for verb in parser._subparsers._group_actions[0].choices.values():
        def act(arguments, act=verb.get_default("run")):
            print("noise of Python")
            os.write(1, b"noise of C\\n")
            act(arguments)
        verb.set_defaults(run=act)
    return parser
command.build_parser = build_parser
sys.exit(command.main())
"""
TEXT_TEACHER = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "torch_dtype": "float32",
}  # fmt: skip


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


def test_a_folder_without_a_cache_or_checkpoint_is_a_users_mistake(tmp_path, capsys):
    image = tmp_path / "x.png"
    image.write_bytes(b"")
    data = tmp_path / "data.jsonl"
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
    data.write_text(json.dumps({"id": "a", "conversations": turns}))
    for command, words in (
        (["verify", str(tmp_path)], "no cache is here (cache.json is missing)"),
        (["inspect", str(tmp_path)], "no cache is here (cache.json is missing)"),
        (["ask", "--model", str(tmp_path), "--image", str(image), "what?"], "is not a checkpoint"),
        (
            ["dump", f"teacher.model={tmp_path}", f"data={{sources: [{{path: {data}}}]}}"],
            "no checkpoint is in the folder",
        ),
    ):
        assert main(command) == 2, command
        assert words in capsys.readouterr().err


def test_a_reader_that_closes_the_pipe_is_no_failure(tmp_path):
    write_cache(tmp_path, families=("response",))
    process = subprocess.Popen(
        [sys.executable, "-m", "stillhouse", "inspect", str(tmp_path)],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate()
    assert process.returncode == 141
    assert said == ""


def test_an_output_that_goes_to_a_full_disk_is_one_sentence(tmp_path):
    write_cache(tmp_path, families=("response",))
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stillhouse", "inspect", str(tmp_path)],
            cwd=Path(__file__).parents[2], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("stillhouse: a file cannot be written: No space left on device")
    assert done.stderr.count("\n") == 1


def test_a_mistake_in_the_file_of_a_replay_is_found_before_the_scan(tmp_path, capsys):
    write_cache(tmp_path, families=("response",))
    (tmp_path / "manifest.json").write_text("damaged")
    assert main(["verify", str(tmp_path), "--replay", "3", "missing.yaml"]) == 2
    assert main(["verify", str(tmp_path), "--replay", "0"]) == 2
    said = capsys.readouterr().err
    assert "missing.yaml: cannot be read" in said
    assert "manifest" not in said


def test_a_tokenizer_or_image_folder_that_is_not_there_is_named(tmp_path, capsys):
    write_cache(tmp_path, families=("response",))
    for option in ("--tokenizer", "--images"):
        assert main(["inspect", str(tmp_path), option, "/nowhere"]) == 2
        assert f"{option} /nowhere is not a folder" in capsys.readouterr().err


def test_verify_and_inspect_take_the_url_of_a_cache(capsys):
    pytest.importorskip("moto.server")
    from tests.storage.s3_server import BUCKET, set_s3_environment

    with set_s3_environment():
        url = f"s3://{BUCKET}/some/cache"
        write_cache(url, families=("response",))
        assert main(["verify", url]) == 0
        assert f"{url}: whole; 12 samples in 2 parts" in capsys.readouterr().out
        assert main(["inspect", url]) == 0
        assert "segment 0" in capsys.readouterr().out
        assert main(["verify", f"s3://{BUCKET}/no/cache"]) == 2
        assert "no cache is here" in capsys.readouterr().err


def test_inspect_shows_segments(tmp_path, capsys):
    write_cache(tmp_path, families=("response",))
    writer = CacheWriter.open(tmp_path, make_identity(), ("visual",))
    for part in range(2):
        writer.write_part(part, make_part(part, families=("visual",)))
    writer.seal()
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "tokens, response of parts 0 to 1" in said
    assert "visual of parts 0 to 1, added to segment 0" in said


def test_json_is_alone_on_stdout_whatever_a_verb_prints_besides(tmp_path, capfd):
    data = tmp_path / "data.jsonl"
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
    data.write_text("".join(json.dumps({"id": str(number), "conversations": turns}) + "\n" for number in range(4)))
    make_tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(TEXT_TEACHER))
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"runs_dir: {tmp_path}\nname: run\nteacher: {{model: {tmp_path / 'teacher'}}}\n"
        f"cache: {{families: []}}\ndata: {{sources: [{{path: {data}}}]}}\n"
    )
    write_cache(tmp_path / "cache", families=("response",))
    cache = str(tmp_path / "cache")
    sample = Cache.open(cache).sample_ids[0]
    for command in (
        ["verify", cache, "--json"],
        ["inspect", cache, "--json", "--sample", sample],
        ["plan", str(file), "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", NOISY, *command],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout), dict), command
        assert "noise of Python" in done.stderr
        assert "noise of C" in done.stderr


@pytest.mark.parametrize("module", ["stillhouse", "teacher_dump"])
def test_a_current_folder_that_was_removed_is_one_sentence(module, tmp_path):
    words = {"stillhouse": "check", "teacher_dump": "pipeline.yaml"}[module]
    done = subprocess.run(
        ["bash", "-c", 'rmdir "$PWD"; exec "$@"', "bash", sys.executable, "-m", module, words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "the current folder does not exist any more" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "words", "code"),
    [
        ("stillhouse", ["verify", "CACHE", "--json"], 0),
        ("stillhouse", ["verify", "CACHE"], 0),
        ("stillhouse", ["check", "missing.yaml"], 2),
        ("teacher_dump", ["missing.yaml"], 2),
        ("student_train.evaluate", ["missing.yaml", "--model", "."], 2),
    ],
)
def test_standard_streams_that_are_closed_change_no_exit_code(module, words, code, tmp_path):
    """As a service may start it. A file that is opened does not get the number of one of them."""
    write_cache(tmp_path, families=("response",))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    argv = [sys.executable, "-m", module, *(str(tmp_path) if word == "CACHE" else word for word in words)]
    for closed in (">&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["bash", "-c", f'exec "$@" {closed}', "bash", *argv],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
