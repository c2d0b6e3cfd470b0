"""The `data:`, `teacher:` and `dump:` sections of pipeline.yaml: samples, the teacher, the work."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from storage.config import Section


class SourceSection(Section):
    """One LLaVA-format JSON or JSONL file."""

    path: str
    images: str | None = None  # folder that image paths are relative to; default: the file's own folder
    split: str = "train"  # a name that stages and evaluation select by
    limit: Annotated[int, Field(ge=1)] | None = None  # samples, from the file's start
    ids: Literal["given", "position"] = "given"  # position: file name and row number, where ids repeat


class DataSection(Section):
    """What the teacher is asked about. Sample ids must be unique over all sources."""

    sources: tuple[SourceSection, ...] = ()


class TeacherSection(Section):
    """The teacher's checkpoint and how it is served."""

    model: str  # local folder or hub id
    revision: str | None = None
    backend: Literal["vllm", "transformers"] = "vllm"  # transformers is the slow reference
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    max_length: Annotated[int, Field(ge=2)] = 2048  # tokens, visual tokens included
    settings: dict[str, Any] = {}  # passed to vllm.LLM by name, such as tensor_parallel_size


class DumpSection(Section):
    """How the work is cut and who does it."""

    samples_per_part: Annotated[int, Field(ge=1)] = 256
    actors: Annotated[int, Field(ge=1)] = 1  # one teacher each
    cpus_per_actor: Annotated[float, Field(ge=0)] = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None  # None: tensor_parallel_size where Ray has GPUs, or 0
    ray_address: str | None = None  # of a running cluster; None: RAY_ADDRESS if set, else a local one
    rows_per_chunk: Annotated[int, Field(ge=1)] = 1024  # rows of [rows, vocabulary] in memory at once
    max_error_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01  # of samples; above it the dump fails
    blind_check_samples: Annotated[int, Field(ge=0)] = 4  # images swapped to see that outputs change
