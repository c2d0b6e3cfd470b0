"""The target is written whole or not at all, loads as a teacher and as a student, and says where it comes from."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from stillhouse.__main__ import main
from stillhouse.conversion.checkpoint_writer import ShardWriter
from stillhouse.conversion.conversion import Options
from stillhouse.conversion.convert import convert
from storage.errors import ConfigError
from student_train.data.image_inputs import ImageProcessorAdapter
from student_train.models.huggingface import load_processor
from student_train.models.loading import read_checkpoint
from tests.stillhouse.conversion import foreign_checkpoints as foreign

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target of a TinyLLaVA in four shards; its source lies beside it."""
    folder = tmp_path_factory.mktemp("converted")
    (folder / "source").mkdir()
    foreign.make_tinyllava(folder / "source", eos="<|im_end|>")
    convert(folder / "source", folder / "target", shard_bytes=200_000)
    return folder / "target"


def read_names(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.safetensors"))
    names = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names |= dict.fromkeys(tensors.keys(), file.name)
    return names


def test_names_are_those_that_vllm_and_transformers_read(converted: Path) -> None:
    names = read_names(converted)
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict(sorted(names.items()))
    assert len(set(names.values())) > 2
    parts = {name.split(".")[0] for name in names}
    assert parts == {"language_model", "vision_tower", "multi_modal_projector"}
    assert all(name.startswith("vision_tower.vision_model.") for name in names if name.startswith("vision_tower"))
    assert "vision_tower.vision_model.head.probe" in names
    assert "language_model.lm_head.weight" not in names  # tied, though the source stores it twice


def test_a_dropped_first_patch_stays_dropped_for_teacher_and_student(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["vision_feature_select_strategy"] == "default"
    assert config["image_seq_length"] == 15  # of 16; 728 of 729 in the public ones
    assert config["dtype"] == "float32"
    checkpoint = read_checkpoint(converted)
    assert checkpoint.sequence_format.tokens_per_image == 15
    assert checkpoint.sequence_format.image_token_id == 300
    inputs = ImageProcessorAdapter(load_processor(converted), image_token_id=300)
    assert int(np.count_nonzero(inputs.expand_image((41, 29)) == 300)) == 15


def test_the_template_renders_the_text_that_the_source_was_trained_with(converted: Path) -> None:
    processor = load_processor(converted)
    image, question = {"type": "image"}, {"type": "text", "text": " what colour? "}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [question, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "and 2?"}]},
    ]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    text = f"{system} USER: <image>\nwhat colour? ASSISTANT: red<|im_end|>USER: and 2? ASSISTANT:"
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == text
    messages.append({"role": "assistant", "content": "4"})
    assert processor.apply_chat_template(messages) == f"{text} 4<|im_end|>"
    assert processor.tokenizer.eos_token == "<|im_end|>"
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation["eos_token_id"] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_qwen_of_llava_has_chatml(tmp_path: Path) -> None:
    foreign.make_llava(tmp_path / "source", kind="llava_qwen", tower="siglip")
    convert(tmp_path / "source", tmp_path / "target")
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    assert load_processor(tmp_path / "target").apply_chat_template(messages) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nwhat?<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n"
    )


def test_the_same_conversion_has_nothing_to_do_and_another_is_refused(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, before = str(converted.with_name("source")), read_times(converted)
    assert main(["convert", source, str(converted)]) == 0
    assert "nothing to do; it was converted from tinyllava" in capsys.readouterr().out
    assert main(["convert", source, str(converted), "--template", "qwen2_base"]) == 2
    assert "was converted from something else (options differ" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    foreign.make_tinyllava(tmp_path / "other", eos="<|im_end|>", tokenizer_model_max_length=1024)
    assert main(["convert", str(tmp_path / "other"), str(converted)]) == 2
    assert "(source differ" in capsys.readouterr().err
    assert read_times(converted) == before
    (tmp_path / "mine").mkdir()
    assert main(["convert", source, str(tmp_path / "mine")]) == 2
    assert "exists and is no converted checkpoint" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []
    assert main(["convert", source, source]) == 2
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "new")]) == 2
    assert "absent does not exist" in capsys.readouterr().err


def read_times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_is_killed_leaves_no_target_and_runs_again(tmp_path: Path, number: int) -> None:
    """The process signals itself when its third shard is written, so the moment does not depend on speed."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    foreign.make_tinyllava(source)
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from stillhouse.conversion.convert import convert\n"
        "from storage.entry_point import run_command\n"
        "def stop(event, arguments):\n"
        "    if event == 'os.chmod' and 'shard-00003' in str(arguments[0]):\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "sys.addaudithook(stop)\n"
        f"sys.exit(run_command(lambda: convert(Path({str(source)!r}), Path({str(target)!r}), shard_bytes=100_000)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL), done.stderr
    left = [path for path in tmp_path.iterdir() if path != source and not path.name.endswith("~lock")]
    assert not target.exists()
    assert bool(left) == (number == signal.SIGKILL)
    assert convert(source, target).is_new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_writer_holds_one_shard_at_most(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    writer = ShardWriter(tmp_path, shard_bytes=1000)
    for number in range(20):
        writer.add(f"t{number}", torch.full((100,), float(number)))
    writer.finish()
    assert writer.peak_bytes <= 1000
    assert len(list(tmp_path.glob("*.safetensors"))) == 10
    with pytest.raises(FileNotFoundError):
        ShardWriter(tmp_path / "absent").finish()


def test_the_record_names_contents_and_no_paths(converted: Path) -> None:
    text = (converted / "conversion.json").read_text()
    record = json.loads(text)
    assert (record["format"], record["mapping_version"], record["source"]["name"]) == ("tinyllava", 1, "source")
    assert len(record["source"]["sha256"]) == 64
    assert any("15 visual tokens" in note for note in record["notes"])
    assert str(converted.parent) not in text


def test_a_decoder_without_a_row_for_the_image_token_gets_their_mean(tmp_path: Path) -> None:
    tensors = foreign.make_llava(tmp_path / "source")
    notes = "\n".join(convert(tmp_path / "source", tmp_path / "target").notes)
    assert "had 300 rows and the tokenizer has 301 tokens" in notes
    with safe_open(tmp_path / "target" / "model.safetensors", framework="pt") as written:
        head = written.get_tensor("language_model.lm_head.weight")
    assert torch.equal(head[:300], tensors["lm_head.weight"])
    torch.testing.assert_close(head[300], tensors["lm_head.weight"].mean(0))
    assert read_checkpoint(tmp_path / "target").sequence_format.image_token_id == 300


def test_an_option_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    foreign.make_llava(tmp_path / "source")
    with pytest.raises(ConfigError, match="--vision-tower nowhere is not a folder"):
        convert(tmp_path / "source", tmp_path / "target", Options(vision_tower=Path("nowhere")))
