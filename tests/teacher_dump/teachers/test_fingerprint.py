from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from teacher_dump.prompts.processor import load_processor
from teacher_dump.teachers import fingerprint
from teacher_dump.teachers import hf_checkpoint as checkpoint


def test_facts_of_the_tiny_teacher(tiny_teacher: Path, tmp_path: Path) -> None:
    calls: list[Path] = []

    def load() -> object:
        calls.append(tiny_teacher)
        return load_processor(tiny_teacher)

    memory = fingerprint.FingerprintMemory(tmp_path / "memory.json")
    facts = memory.facts(tiny_teacher, load)
    assert (facts.vocab_size, facts.image_token_id, facts.eos_token_ids) == (300, 299, (298,))
    assert memory.facts(tiny_teacher, load) == facts
    assert fingerprint.FingerprintMemory(tmp_path / "memory.json").facts(tiny_teacher, load) == facts
    assert len(calls) == 1


def test_weights_fingerprint_is_of_the_content_and_forgotten_when_it_changes(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(tiny_teacher, one)
    shutil.copytree(tiny_teacher, two)
    memory = fingerprint.FingerprintMemory(tmp_path / "memory.json")
    assert fingerprint.compute_weights_fingerprint(one, memory) == fingerprint.compute_weights_fingerprint(two, memory)
    before = fingerprint.compute_weights_fingerprint(one, memory)
    content = bytearray((one / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (one / "model.safetensors").write_bytes(content)
    assert fingerprint.compute_weights_fingerprint(one, memory) != before
    settings = (two / "config.json").read_text(encoding="utf-8")
    (two / "config.json").write_text(settings.replace("1e-06", "1e-05"), encoding="utf-8")
    assert fingerprint.compute_weights_fingerprint(two, memory) != before


def test_a_broken_fingerprint_file_is_an_empty_cache(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text("{broken", encoding="utf-8")
    memory = fingerprint.FingerprintMemory(tmp_path / "memory.json")
    assert memory.recall("x", [tiny_teacher / "config.json"], lambda: 7) == 7


def test_context_length_is_the_language_models(tiny_teacher: Path) -> None:
    assert checkpoint.get_context_length(checkpoint.read_json(tiny_teacher / "config.json")) == 512


def test_an_engine_that_rounds_further_is_another_teacher() -> None:
    assert (
        fingerprint.describe_served_dtype("bfloat16", {"tensor_parallel_size": 2, "kv_cache_dtype": "auto"})
        == "bfloat16"
    )
    rounded = fingerprint.describe_served_dtype("bfloat16", {"quantization": "fp8", "kv_cache_dtype": "fp8"})
    assert rounded == "bfloat16 quantization=fp8 kv_cache_dtype=fp8"


@pytest.mark.parametrize("name", ["num_image_tokens", "image_seq_len", "image_seq_length"])
def test_another_number_of_visual_tokens_is_another_preprocessing(name: str, tiny_teacher: Path) -> None:
    found = []
    for number in (4, 9):
        processor = load_processor(tiny_teacher)
        setattr(processor, name, number)
        found.append(fingerprint.read_processor_facts(tiny_teacher, processor).image_preprocessing_fingerprint)
    assert len(set(found)) == 2
