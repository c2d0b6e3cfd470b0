"""The model of `data.responses: {model: DIR}`: its checkpoint, how it is served, and what decides its answers.

It gets the teacher's prompts and the pictures in them, and prepares the pictures with its own processor. It must have
the teacher's tokenizer, by the rule that students are held to (student_train/models/loading.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import ConfigError, StillhouseError
from storage.images.settings import PIXELS_FILE, read_pixel_settings
from teacher_dump.config import AnsweringModelSection
from teacher_dump.prompts.processor import load_processor
from teacher_dump.teachers import fingerprint
from teacher_dump.teachers import hf_checkpoint as checkpoint
from teacher_dump.teachers.architectures import read_engine_support

_FIELD = "data.responses.model"


@dataclass(frozen=True)
class AnsweringModel:
    """A checked checkpoint that generates answers, and how it is served."""

    checkpoint: Path
    backend: str  # vllm or transformers
    dtype: str
    max_length: int  # tokens; the teacher's, or the model's own limit if that is lower
    image_token_id: int  # -1 for a model without images
    engine_settings: dict[str, Any]
    description: dict[str, str]  # of everything about the model that decides its answers; no paths


def read_answering_model(
    section: AnsweringModelSection,
    teacher: fingerprint.ProcessorFacts,
    memory: fingerprint.FingerprintMemory,
    *,
    max_length: int,
    shows_images: bool,
) -> AnsweringModel:
    """Reads and checks a model that is to answer a teacher's prompts. Loads no weights.

    `shows_images`: whether any prompt has an image. Raises ConfigError, naming the folder, for a model that is
    missing, incomplete or unable to answer these prompts.
    """
    folder = Path(section.model)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ConfigError(
            f"{_FIELD}: {folder} {what}; give the folder of a checkpoint, such as the output of a stage that has ended"
        )
    folder = folder.resolve()
    trust = bool(section.settings.get("trust_remote_code", False))
    backend = section.backend or fingerprint.choose_backend()
    unknown = sorted(set(section.settings) - {"trust_remote_code"})
    if backend == "transformers" and unknown:
        raise ConfigError(f"data.responses.settings: the transformers backend takes no {', '.join(unknown)}")
    try:
        facts = memory.facts(folder, lambda: load_processor(folder, trust_remote_code=trust))
        config = checkpoint.read_json(folder / "config.json")
        weights = fingerprint.compute_weights_fingerprint(folder, memory)
        dtype = checkpoint.read_saved_dtype(folder) if section.dtype == "auto" else section.dtype
        engine = fingerprint.get_engine_version(backend)
    except StillhouseError as error:
        raise ConfigError(f"{_FIELD}: {error}") from error
    support = read_engine_support(config)
    if support.state == "refused" and backend == "vllm":
        if section.backend == "vllm":
            raise ConfigError(
                f"data.responses.backend: vllm cannot serve a {support.model_type}: {support.reason}; leave it out, or "
                "set transformers"
            )
        backend, engine = "transformers", fingerprint.get_engine_version("transformers")
    _check_fit(folder, facts, teacher, config, shows_images=shows_images)
    return AnsweringModel(
        checkpoint=folder,
        backend=backend,
        dtype=dtype,
        max_length=min(max_length, checkpoint.get_context_length(config) or max_length),
        image_token_id=-1 if facts.pixels is None else facts.image_token_id,
        engine_settings=dict(section.settings),
        description={
            "model": weights,
            "dtype": fingerprint.describe_served_dtype(dtype, section.settings),
            "engine": engine,
            "image_preprocessing": facts.image_preprocessing_fingerprint,
        },
    )


def _check_fit(
    folder: Path,
    facts: fingerprint.ProcessorFacts,
    teacher: fingerprint.ProcessorFacts,
    config: dict[str, Any],
    *,
    shows_images: bool,
) -> None:
    """Raises ConfigError for another tokenizer, a small head, or a model that does not see the prompts' images."""
    problems = [
        f"{name}: the teacher has {theirs}, {folder} has {ours}"
        for name, ours, theirs in (
            ("tokenizer_fingerprint", facts.tokenizer_fingerprint, teacher.tokenizer_fingerprint),
            ("vocab_size", facts.vocab_size, teacher.vocab_size),
        )
        if ours != theirs
    ]
    rows = checkpoint.get_text_settings(config).get("vocab_size")
    if isinstance(rows, int) and rows < teacher.vocab_size:
        problems.append(f"vocab_size: the teacher has {teacher.vocab_size}, the head of {folder} {rows} rows")
    if problems:
        raise ConfigError(
            f"{_FIELD}: this model cannot answer in the teacher's tokens; give a model with the teacher's tokenizer:"
            + "".join(f"\n  {problem}" for problem in problems)
        )
    if not shows_images:
        return
    if facts.image_token_id < 0 or facts.pixels is None:
        raise ConfigError(
            f"{_FIELD}: {folder} cannot see images, and samples of data.sources have some; give a vision-language "
            "model, or sources without images"
        )
    if facts.image_token_id != teacher.image_token_id:
        raise ConfigError(
            f"{_FIELD}: {folder} sees images at token {facts.image_token_id}, the teacher at token "
            f"{teacher.image_token_id}; give a model with the teacher's image token"
        )
    trained = read_pixel_settings(folder)
    for name, theirs, ours in (
        [] if trained is None or teacher.pixels is None else trained.find_differences(teacher.pixels)
    ):
        if name == "background":
            raise ConfigError(
                f"data.background is {ours}, but {folder}, which is to answer, was trained with {theirs} "
                f"({PIXELS_FILE}); set data.background to {theirs!r}"
            )
