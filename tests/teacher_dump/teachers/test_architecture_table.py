"""The table of architectures: three states, by name, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from storage.errors import ConfigError
from teacher_dump.audit.preflight import list_teacher_warnings
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import read_settings
from teacher_dump.teachers.architectures import (
    check_backend,
    engine_support,
    list_known_support,
    read_engine_support,
)
from tests.teacher_dump.conftest import WriteConfig
from tests.tiny_architectures import ARCHITECTURES, PUBLISHED


def test_an_unknown_architecture_is_untested() -> None:
    support = engine_support("a_model_of_next_year")
    assert (support.state, support.way_round) == ("untested", "")
    assert "no test here" in support.reason
    warning = check_backend({"model_type": "a_model_of_next_year"}, "vllm")
    assert warning is not None
    assert "a_model_of_next_year is untested in vLLM" in warning
    assert check_backend({"model_type": "a_model_of_next_year"}, "transformers") is None
    assert check_backend({}, "vllm") is not None


def test_every_state_says_why() -> None:
    table = list_known_support()
    assert len({support.model_type for support in table}) == len(table)
    for support in table:
        assert bool(support.reason) == (support.state != "tested"), support
        assert not support.way_round or support.state == "refused", support


def test_what_the_table_calls_tested_is_tested() -> None:
    """The matrix runs every architecture that is tested, and knows what the table says of each of its own."""
    tested = {support.model_type for support in list_known_support() if support.state == "tested"}
    assert tested <= set(ARCHITECTURES)
    assert set(ARCHITECTURES) <= {support.model_type for support in list_known_support()}
    assert set(PUBLISHED) == set(ARCHITECTURES)


def test_a_llava_is_untested_with_a_decoder_that_is() -> None:
    """`compose` and `convert` make LLaVAs with decoders that no test compares."""
    support = read_engine_support({"model_type": "llava", "text_config": {"model_type": "gpt_oss"}})
    assert (support.state, support.model_type) == ("untested", "llava with a gpt_oss decoder")
    for decoder in ("llama", "qwen2"):
        assert read_engine_support({"model_type": "llava", "text_config": {"model_type": decoder}}).state == "tested"
    own = {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}}
    assert read_engine_support(own).state == "tested"


def test_a_refused_decoder_refuses_the_whole_model() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "step3p5"}}
    assert read_engine_support(config).model_type == "step3p5"
    with pytest.raises(ConfigError, match=r"a step3p5 cannot be a teacher.*before the last norm; set teacher.backend"):
        check_backend(config, "vllm")
    assert check_backend(config, "transformers") is None
    with pytest.raises(ConfigError, match=r"a chameleon .*backend: transformers.*choose another teacher"):
        check_backend({"model_type": "chameleon"}, "transformers")
    assert check_backend({"model_type": "llava", "text_config": {"model_type": "llama"}}, "vllm") is None


def test_a_plan_refuses_an_architecture_and_names_an_untested_one(
    write_config: WriteConfig, tiny_teacher: Path, tmp_path: Path
) -> None:
    """The dump's plan, which `check`, `plan` and `dump` make before any weight is read."""

    def planned(model_type: str, backend: str) -> list[str]:
        folder = tmp_path / model_type
        if not folder.exists():
            shutil.copytree(tiny_teacher, folder)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"model_type": model_type}
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        settings = read_settings(write_config(teacher={"model": str(folder), "backend": backend}))
        return list_teacher_warnings(plan_dump(settings), settings.teacher)

    assert planned("llava", "vllm") == []
    (warning,) = planned("llava_next", "vllm")
    assert warning.startswith("teacher: a llava_next is untested in vLLM: ")
    with pytest.raises(ConfigError, match=r"teacher\.model: a paligemma .*set teacher.backend: transformers"):
        planned("paligemma", "vllm")
