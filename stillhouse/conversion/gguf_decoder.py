"""Decoders in GGUF files, read by transformers: its table of architectures and quantisations, not ours.

transformers makes floats of the quantised weights, all in memory at once. The result has no image tower; `compose:`
puts one before it.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from stillhouse.conversion.checkpoint_writer import ShardWriter
from storage.errors import ConfigError, StillhouseError
from student_train.models.checkpoint import copy_processor
from student_train.models.huggingface import import_transformers

NAME = "gguf"
_NEEDED = ("gguf", "accelerate")  # what transformers reads such files with
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_readable(file: Path) -> None:
    """ConfigError if the file is no GGUF, or a package that reads it is missing."""
    with file.open("rb") as start:
        magic = start.read(4)
    if magic != b"GGUF":
        raise ConfigError(f"{file}: begins with {magic!r}, expected b'GGUF'; copy the file again")
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{file}: {' and '.join(missing)} must be installed to read GGUF files: pip install {' '.join(_NEEDED)}"
        )


def write_decoder(file: Path, target: Path, *, dtype: str, tokenizer_folder: Path | None) -> tuple[str, ...]:
    """Write the decoder and its tokenizer into the empty folder `target`; return notes for the user.

    Errors: ConfigError for a file that transformers cannot read.
    """
    model, tokenizer = _load(file, DTYPES[dtype], with_tokenizer=tokenizer_folder is None)
    settings = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    config = type(model.config)(**settings)
    tied = dict(model.all_tied_weights_keys)
    config.tie_word_embeddings = bool(tied)
    config.dtype = DTYPES[dtype]
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    writer = ShardWriter(target)
    for name, tensor in model.state_dict().items():
        if name not in tied:
            writer.add(name, tensor)
    writer.finish()
    if tokenizer_folder is None:
        tokenizer.save_pretrained(target)
    else:
        copy_processor(tokenizer_folder, target)
    notes = [f"the quantised weights became {dtype} numbers with the same values; the file does not become more exact"]
    if getattr(tokenizer, "chat_template", None) is None and tokenizer_folder is None:
        notes.append("the file has no chat template; give the target one (chat_template.jinja) to ask it questions")
    return tuple(notes)


def _load(file: Path, dtype: torch.dtype, *, with_tokenizer: bool) -> tuple[Any, Any]:
    transformers = import_transformers()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=dtype, output_loading_info=True
            )
            tokenizer = None
            if with_tokenizer:
                tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except StillhouseError:
        raise
    except Exception as error:  # whatever transformers and gguf raise for a file that they do not read
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"{file}: transformers cannot read this GGUF file: {first_line}") from error
    tied = set(model.all_tied_weights_keys)
    missing = sorted(name for name in info["missing_keys"] if name not in tied)
    if missing:
        raise ConfigError(f"{file}: lacks {len(missing)} tensors, such as {missing[0]}; give a complete file")
    return model, tokenizer
