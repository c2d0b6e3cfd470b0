"""Converts a foreign checkpoint into one of transformers, whole or not at all.

Everything that can be refused is refused before weights are read. The target is written into a folder beside it and
renamed; `conversion.json` in it records what it was made from, by which the same command finds that nothing is to do.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.conversion import gguf_decoder
from stillhouse.conversion.checkpoint_writer import SHARD_BYTES, ShardWriter, write_tensors
from stillhouse.conversion.conversion import Conversion, Options, count_rows, make_llava_config
from stillhouse.conversion.formats import READERS, Detected, detect_format, list_read_files
from stillhouse.conversion.processor_files import save_processor
from stillhouse.conversion.source_tensors import list_tensors
from stillhouse.conversion.tensor_plan import PlannedTensor, list_expected, plan_tensors
from storage.backends.disk import explain_write_errors, format_bytes, measure_free_bytes
from storage.backends.folder import sync, write_json
from storage.backends.lock import hold_lock
from storage.errors import ConfigError, StillhouseError
from student_train.models.huggingface import import_transformers
from student_train.models.loading import read_checkpoint

RECORD = "conversion.json"
MAPPING_VERSION = 1  # raise it when a mapping changes what it writes
_OPTIONS = {  # which formats read an option
    "vision_tower": ("llava", "moe_llava"),
    "base": ("llava",),
    "tokenizer": ("tinyllava", "llava", "moe_llava", "gguf"),
    "template": ("tinyllava", "llava", "moe_llava"),
    "dtype": ("gguf",),
}
_ROWS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")  # one row a token


@dataclass(frozen=True)
class Converted:
    """The result of a conversion. `is_new` is False where the target was there already."""

    format: str
    notes: tuple[str, ...]
    is_new: bool


def convert(source: Path, target: Path, options: Options | None = None, *, shard_bytes: int = SHARD_BYTES) -> Converted:
    """Write the checkpoint `target` from the foreign one at `source`. Nothing is downloaded, no code of it is run.

    Errors: ConfigError for a source that cannot be mapped, naming key or tensor, and for a target that is something
    else; HeldError if another process writes the target; WriteError for a full disk.
    """
    options = options or Options()
    target = target.resolve()  # `.` has a name then
    detected = detect_format(source)
    _check_options(options, detected.format)
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"TARGET {target} is or holds SOURCE {source}; give another folder")
    missing = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        return _convert_locked(detected, target, options, shard_bytes)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # not empty: another process writes there
                parent.rmdir()
        raise


def _convert_locked(detected: Detected, target: Path, options: Options, shard_bytes: int) -> Converted:
    with hold_lock(target.with_name(f"{target.name}~lock"), f"the converted checkpoint {target}", patience_s=math.inf):
        for left in target.parent.glob(f"{glob.escape(target.name)}.tmp-*"):  # of a conversion that was killed
            shutil.rmtree(left, ignore_errors=True)
        if os.path.lexists(target):
            return _accept_existing(target, detected, options)
        new = target.with_name(f"{target.name}.tmp-{os.getpid()}-{secrets.token_hex(6)}")
        try:
            with explain_write_errors(target):
                new.mkdir()
                notes = _write(detected, new, target, options, shard_bytes)
                write_json(new / RECORD, {**_describe_inputs(detected, options), "notes": list(notes)})
                _move(new, target)
        except StillhouseError as error:  # its message may name the temporary folder
            raise type(error)(str(error).replace(str(new), str(target))) from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return Converted(detected.format, notes, is_new=True)


def _check_options(options: Options, source_format: str) -> None:
    for name, formats in _OPTIONS.items():
        if getattr(options, name) != getattr(Options(), name) and source_format not in formats:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} is not for the format {source_format}, only for {', '.join(formats)}; leave it out"
            )
    for name, folder in (
        ("--vision-tower", options.vision_tower),
        ("--base", options.base),
        ("--tokenizer", options.tokenizer),
    ):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{name} {folder} is not a folder")
    if options.dtype not in gguf_decoder.DTYPES:
        raise ConfigError(f"--dtype is {options.dtype}, expected one of {', '.join(gguf_decoder.DTYPES)}")


def _describe_inputs(detected: Detected, options: Options) -> dict[str, Any]:
    """Return what decides a target's content, as JSON: contents by their sha256, not where they lie."""
    files = list_read_files(detected)
    root = detected.path.parent if detected.path.is_file() else detected.path
    named = detected.config.get("mm_vision_tower") or detected.config.get("mm_image_tower")
    tower = Path(named) if options.vision_tower is None and named and Path(named).is_dir() else options.vision_tower
    folders = {"vision_tower": tower, "base": options.base, "tokenizer": options.tokenizer}
    return {
        "format": detected.format,
        "mapping_version": MAPPING_VERSION,
        "source": {
            "name": detected.path.resolve().name,
            "sha256": _hash_files(files, root),
            "num_bytes": sum(path.stat().st_size for path in files),
        },
        "options": {
            **{
                name: None if folder is None else _hash_files(list_read_files(Detected("llava", folder, {})), folder)
                for name, folder in folders.items()
            },
            "template": options.template,
            "dtype": options.dtype if detected.format == gguf_decoder.NAME else None,
        },
    }


def _hash_files(files: Sequence[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()}\0{inner}\n".encode())
    return digest.hexdigest()


def _accept_existing(target: Path, detected: Detected, options: Options) -> Converted:
    """Return the result that is there. ConfigError if it is something else than this conversion."""
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
        recorded = {key: record[key] for key in ("format", "mapping_version", "options")}
        sha256, notes = record["source"]["sha256"], tuple(map(str, record["notes"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"TARGET {target} exists and is no converted checkpoint (it has no readable {RECORD}); give a path that "
            "does not exist, or remove it"
        ) from error
    inputs = _describe_inputs(detected, options)
    changed = [key for key, value in recorded.items() if value != inputs[key]]
    changed += [] if sha256 == inputs["source"]["sha256"] else ["source"]
    if changed:
        raise ConfigError(
            f"TARGET {target} was converted from something else ({', '.join(changed)} differ, see its {RECORD}); give "
            "a path that does not exist, or remove it"
        )
    return Converted(str(inputs["format"]), notes, is_new=False)


def _write(detected: Detected, new: Path, target: Path, options: Options, shard_bytes: int) -> tuple[str, ...]:
    if detected.format == gguf_decoder.NAME:
        gguf_decoder.check_readable(detected.path)
        return gguf_decoder.write_decoder(detected.path, new, dtype=options.dtype, tokenizer_folder=options.tokenizer)
    conversion = READERS[detected.format](detected.path, detected.config, options)
    return _write_llava(conversion, new, target, shard_bytes)


def _write_llava(conversion: Conversion, new: Path, target: Path, shard_bytes: int) -> tuple[str, ...]:
    num_rows, needed_rows = conversion.text_config.vocab_size, count_rows(conversion.tokenizer)
    if needed_rows > num_rows + 1:
        raise ConfigError(
            f"the tokenizer has {needed_rows} tokens with <image>, but the decoder {num_rows} rows, so it belongs to "
            "another model; give the decoder's: --tokenizer DIR"
        )
    config = make_llava_config(conversion)
    place = str(conversion.files[0].path.parent)
    planned = plan_tensors(
        list_tensors(conversion.files),
        conversion.map_name,
        list_expected(config),
        grown=dict.fromkeys(_ROWS, config.text_config.vocab_size),
        place=place,
    )
    _check_space(planned, target)
    config.dtype = config.text_config.dtype = _find_dtype(planned)
    config.save_pretrained(new)
    import_transformers().GenerationConfig(
        eos_token_id=config.text_config.eos_token_id, bos_token_id=conversion.tokenizer.bos_token_id
    ).save_pretrained(new)
    save_processor(new, conversion.tokenizer, conversion.vision, conversion.template)
    write_tensors(planned, ShardWriter(new, shard_bytes=shard_bytes))
    checkpoint = read_checkpoint(new)
    if checkpoint.sequence_format.tokens_per_image != conversion.vision.num_tokens:
        raise StillhouseError(
            f"{new}: a student would count {checkpoint.sequence_format.tokens_per_image} visual tokens, expected "
            f"{conversion.vision.num_tokens}; please report it"
        )
    notes = list(conversion.notes)
    if needed_rows > num_rows:
        notes.append(
            f"the decoder had {num_rows} rows and the tokenizer has {needed_rows} tokens: new rows, such as that of "
            "<image>, are the mean of the others, in the head too"
        )
    return tuple(notes)


def _find_dtype(planned: Sequence[PlannedTensor]) -> Any:
    """Return the dtype of most of the weights; every tensor keeps its own."""
    sizes: Counter[Any] = Counter()
    for each in planned:
        if each.pieces:
            sizes[each.source.dtype] += each.source.num_bytes
    return sizes.most_common(1)[0][0]


def _check_space(planned: Sequence[PlannedTensor], target: Path) -> None:
    needed = sum(each.source.num_bytes for each in planned if each.pieces)
    free = measure_free_bytes(target.parent)
    if free is not None and needed > free:
        raise ConfigError(
            f"TARGET {target}: its disk has {format_bytes(free)} free, but the converted checkpoint needs "
            f"{format_bytes(needed)}; free space there, or give another folder"
        )


def _move(new: Path, target: Path) -> None:
    for path in new.rglob("*"):
        if path.is_file():
            sync(path)
    sync(new)
    new.rename(target)
    sync(target.parent)
