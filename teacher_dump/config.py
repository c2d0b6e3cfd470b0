"""The `data:`, `teacher:`, `dump:` and `check:` sections of pipeline.yaml."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from storage.config import LocalPath, Section
from storage.images.settings import WHITE, Background

SourceFormat = Literal["json", "parquet", "webdataset", "datasets"]
TooLong = Literal["refuse", "cut_turns", "cut_answer"]  # see teacher_dump/prompts/truncation.py
Ignorable = Literal[  # see teacher_dump/data/unread_fields.py
    "video", "audio", "tools", "reasoning_content", "<video>", "<audio>", "<img>", "<image 1>", "<ImageHere>", "media"
]  # fmt: skip
_RESERVED_ARGUMENTS = frozenset(
    {
        "messages", "conversation", "conversations", "chat_template", "add_generation_prompt", "tokenize", "padding",
        "continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "processor_kwargs",
        "return_assistant_tokens_mask", "tokenizer_kwargs", "tools", "documents", "strftime_now", "raise_exception",
    }
)  # fmt: skip


class SourceSection(Section):
    """A file of conversations or preference pairs, a pattern such as part-*.parquet, or a data set.

    Every format may hold every shape of conversation that teacher_dump/data/conversation.py lists.
    """

    path: LocalPath  # a file, a pattern, a folder of save_to_disk, or a hub id where `format: datasets` says so
    format: SourceFormat | None = None  # None: by suffix; json: lines too
    images: LocalPath | None = None  # folder, zip or tar that image names are relative to; None: the file's own folder
    split: str = "train"  # a name that stages and evaluation select by
    dataset: str | None = None  # the published data set's name, by which `check` lists it where the file is missing
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0  # 0.25: a random quarter of the rows; 2: every row twice
    seed: Annotated[int, Field(ge=0)] = 0  # chooses the rows that `weight` leaves out
    limit: Annotated[int, Field(ge=1)] | None = None  # the first rows only, counted after `weight`
    # chat: the teacher's template; caption: an image, its text and a line break, without the question, as LLaVA
    # shows captions to a new projector
    template: Literal["chat", "caption"] = "chat"
    ids: Literal["given", "position"] = "given"  # position: file name and row number, where ids repeat or are missing;
    # of several sources of one file name the second is name@2, and so on
    columns: dict[str, str] = {}  # our field: the source's own name for it, such as {id: idx}
    ignore: tuple[Ignorable, ...] = ()  # unsupported content to leave out: teacher_dump/data/unread_fields.py
    subset: str | None = None  # of a hub data set that has several; datasets only
    hub_split: str = "train"  # the data set's own name for the split to read; datasets only
    revision: str | None = None  # of a hub data set; datasets only

    @model_validator(mode="after")
    def _check_hub_fields(self) -> SourceSection:
        given = [name for name in ("subset", "hub_split", "revision") if name in self.model_fields_set]
        if given and self.format not in ("datasets", None):
            raise ValueError(f"{given[0]} belongs to format 'datasets', but format is {self.format!r}")
        return self


class SamplingSection(Section):
    """How answers are sampled when `data.responses` is `teacher` or a model."""

    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0  # 0: always the most probable token
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 512  # an answer that does not end by then makes its sample an error
    seed: Annotated[int, Field(ge=0)] = 0


class AnsweringModelSection(Section):
    """A model that generates every answer first, such as a student after SFT. The teacher scores its answers.

    The model sees the teacher's prompts, so its tokenizer must be the teacher's.
    """

    model: LocalPath  # folder of a checkpoint
    backend: Literal["vllm", "transformers"] | None = None  # None: vllm where it is installed, else transformers
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    settings: dict[str, Any] = {}  # passed to vllm.LLM by name


class DataSection(Section):
    """The sources of samples, read in order. Sample ids must be unique over all sources.

    A list in place of the section is read as its sources.
    """

    sources: tuple[SourceSection, ...] = ()
    # folder for images that are not files yet (bytes, archives); None: images/ in the run's folder
    extracted: LocalPath | None = None
    background: Background = WHITE  # the colour behind transparent pixels, as #rrggbb
    # how a sample longer than max_length is handled: cut_turns leaves out whole questions with their
    # answers from the end; cut_answer ends the answer at max_length
    too_long: TooLong = "refuse"
    # rows of each split as published, for a forecast before the data is here (`plan --hardware`)
    published_rows: dict[str, Annotated[int, Field(ge=1)]] = {}
    # teacher: the teacher generates every answer first; {model: DIR}: the model in a folder does
    responses: Literal["dataset", "teacher"] | AnsweringModelSection = "dataset"
    sampling: SamplingSection = SamplingSection()  # for generated answers

    @model_validator(mode="before")
    @classmethod
    def _accept_list(cls, given: Any) -> Any:
        return {"sources": given} if isinstance(given, list) else given

    @model_validator(mode="after")
    def _check_captions(self) -> DataSection:
        if self.responses != "dataset" and any(source.template == "caption" for source in self.sources):
            said = "teacher" if self.responses == "teacher" else "a model"
            raise ValueError(
                f"responses is {said}, but a source has template: caption, which asks nothing; use template: chat"
            )
        return self

    @property
    def answering_model(self) -> AnsweringModelSection | None:
        """The model, other than the teacher, that generates the answers."""
        return self.responses if isinstance(self.responses, AnsweringModelSection) else None

    @property
    def answerer(self) -> Literal["the teacher", "the model"]:
        """Who generates answers, for messages."""
        return "the teacher" if self.answering_model is None else "the model"


class TeacherSection(Section):
    """The teacher's checkpoint and how it is served."""

    model: LocalPath  # local folder or hub id
    # YAML file, beside this one, whose stages make `model`: for people, `check` and `plan --hardware`
    recipe: str | None = None
    revision: str | None = None
    backend: Literal["vllm", "transformers"] = "vllm"  # transformers is the slow reference
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    max_length: Annotated[int, Field(ge=2)] = 2048  # tokens, visual tokens included
    settings: dict[str, Any] = {}  # passed to vllm.LLM by name, such as tensor_parallel_size
    # passed to the chat template by name, such as {enable_thinking: false}; part of the cache's identity
    chat_template_arguments: dict[str, Any] = {}

    @field_validator("chat_template_arguments")
    @classmethod
    def _check_template_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        reserved = sorted(set(given) & _RESERVED_ARGUMENTS)
        if reserved:
            raise ValueError(f"{reserved[0]} is set by the dump itself; leave it out")
        try:
            json.dumps(given)
        except TypeError as error:
            raise ValueError(f"expected text, numbers, true or false, lists of them: {error}") from error
        return given


class ActorRange(Section):
    """A pool of actors that grows while parts wait and the cluster has room, and shrinks when actors are idle.

    A number in place of the section is both the minimum and the maximum.
    """

    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)]

    @model_validator(mode="before")
    @classmethod
    def _accept_number(cls, given: Any) -> Any:
        if isinstance(given, bool) or not isinstance(given, int | dict | ActorRange):
            raise ValueError("expected a whole number, or {min, max}")
        if isinstance(given, int) and given < 1:
            raise ValueError("expected at least 1")
        return {"min": given, "max": given} if isinstance(given, int) else given

    @model_validator(mode="after")
    def _check_order(self) -> ActorRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max {self.max}; min must not be the larger")
        return self


class DumpSection(Section):
    """How samples are divided into parts, and the Ray actors that score them."""

    samples_per_part: Annotated[int, Field(ge=1)] = 256
    actors: ActorRange = ActorRange(max=1)  # one teacher each; a number, or {min, max}: as the cluster has room
    cpus_per_actor: Annotated[float, Field(ge=0)] = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None  # None: tensor_parallel_size where Ray has GPUs, or 0
    ray_address: str | None = None  # of a running cluster; None: RAY_ADDRESS if set, else a local one
    rows_per_chunk: Annotated[int, Field(ge=1)] = 1024  # rows of logits [rows, vocabulary] in memory at once
    max_error_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01  # of samples; above it the dump fails
    blind_check_samples: Annotated[int, Field(ge=0)] = 4  # samples of the vision check; 0 turns it off
    # a dump needs a passed engine check where vLLM is untested with the teacher's architecture
    engine_check: bool = True


class CheckSection(Section):
    """The engine check: how far the engine's outputs may be from those of the model in transformers."""

    engine_samples: Annotated[int, Field(ge=1, le=1024)] = 16  # samples that both score
    max_engine_kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01  # nats a row
