"""The `stages:` and `evaluation:` sections of pipeline.yaml: what is trained, on what, by which losses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from storage.config import LocalPath, Section
from storage.reader.shuffle import WINDOW_ROWS
from student_train.data.sample_filter import Condition, check_condition
from student_train.losses.config import LOSS_OPTIONS, LossesSection

Module = Literal["vision", "projector", "llm", "mlp"]  # mlp: of the decoder's layers, routers and experts too
Precision = Literal["fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]


class MoeSection(Section):
    """Sparse upcycling when the stage begins: every `every`-th layer's MLP becomes experts, copies of it."""

    experts: Annotated[int, Field(ge=2)] = 4
    top_k: Annotated[int, Field(ge=1)] = 2  # experts that see a token
    every: Annotated[int, Field(ge=1)] = 2  # layers 0, every, 2 * every, …

    @model_validator(mode="after")
    def _enough_experts(self) -> MoeSection:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k} of {self.experts} experts; no token can see more than there are")
        return self


class CompositionSection(Section):
    """Parts of a student: folders or hub ids. The projector between them, two layers with GELU, is new."""

    vision: LocalPath  # SigLIP or CLIP; a whole model or its tower
    llm: LocalPath  # a causal decoder
    processor: LocalPath  # tokenizer, chat template and image preprocessing: the teacher's, most often
    projector: Literal["mlp2x_gelu"] = "mlp2x_gelu"
    feature_layer: int = -2  # of the tower, whose output the projector reads
    select: Literal["full", "default"] = "full"  # default drops the first position, which is CLIP's class token


def _checked(conditions: tuple[Condition, ...] | None) -> tuple[Condition, ...] | None:
    for condition in conditions or ():
        check_condition(condition)
    return conditions


# [column, comparison, value] each, on the columns of sample_filter.COLUMNS; all must hold
Filter = Annotated[tuple[Condition, ...], AfterValidator(_checked)]


class SourceSection(Section):
    """One of several caches that a stage trains on. What is left out is as the stage says."""

    path: LocalPath
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0  # times that each of its samples comes in an epoch
    splits: tuple[str, ...] | None = None
    filter: Filter | None = None
    images: LocalPath | None = None


class CheckpointsSection(Section):
    """Checkpoints while a stage runs, in <output>/checkpoints, like the one at its end; the best by a held-out loss."""

    every: Annotated[int, Field(ge=1)]  # steps; the last step's is the stage's own
    keep_last: Annotated[int, Field(ge=0)] = 1  # as step-00000500
    splits: tuple[str, ...] = ()  # held out of training: their losses are logged as held_out_*, and `best` is kept
    samples: Annotated[int, Field(ge=1)] = 256  # of these splits, always the same ones
    metric: str = "loss"  # or one of its parts; the smallest is best

    @model_validator(mode="after")
    def _keeps_something(self) -> CheckpointsSection:
        if not self.keep_last and not self.splits:
            raise ValueError("checkpoints keeps none: give keep_last, or splits by whose loss the best one is known")
        return self


class LoraSection(Section):
    """Adapters of low rank in the decoder, which is frozen itself; the checkpoint holds them merged into it."""

    rank: Annotated[int, Field(ge=1)] = 128  # this and the next two: LLaVA-1.5's
    alpha: Annotated[float, Field(gt=0)] = 256.0  # an adapter counts alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class StageSection(Section):
    """One training stage: start, data, trained modules, losses, schedule."""

    init: LocalPath  # checkpoint folder or hub id; `{seed}` becomes the stage's seed
    compose: CompositionSection | None = None  # makes the checkpoint at `init`, where it is not there yet
    output: LocalPath = "{run}/models/{stage}"  # checkpoint, metrics.jsonl, summary.json
    cache: LocalPath | None = None  # default: cache.path
    caches: Annotated[tuple[SourceSection, ...], Field(min_length=1)] | None = None  # in place of `cache`
    splits: tuple[str, ...] = ("train",)
    filter: Filter = ()  # samples that are trained on
    images: LocalPath | None = None  # folder of images; default: the one that the cache names
    train: Annotated[tuple[Module, ...], Field(min_length=1)] = ("projector", "llm")  # everything else is frozen
    moe: MoeSection | None = None  # makes the dense student of `init` sparse
    lora: LoraSection | None = None  # trains adapters where `train` says llm
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # checkpoints hold averaged weights; what stays, a step
    losses: LossesSection = LossesSection()
    steps: Annotated[int, Field(ge=1)] | None = None  # optimizer steps; or
    epochs: Annotated[float, Field(gt=0)] | None = None  # passes over the splits
    global_batch: Annotated[int, Field(ge=1)] = 128  # samples an optimizer step, over all ranks
    micro_batch: Annotated[int, Field(ge=1)] = 16  # samples a forward pass, per rank
    group_by_length: bool = True  # samples of a global batch that share a micro-batch: less padding, the same mean
    lr: Annotated[float, Field(gt=0)] = 2e-5  # peak
    module_lr: dict[Module, Annotated[float, Field(gt=0)]] = {}  # peaks of trained modules that have their own
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.03  # of the steps, then cosine to 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0  # of the global gradient
    precision: Precision = "bf16"  # fp16: with a loss scale that falls at an overflow, whose step is left out
    zero_stage: Literal[0, 1, 2, 3] = 2  # DeepSpeed ZeRO
    offload: tuple[Literal["optimizer", "parameters"], ...] = ()  # to the CPU's memory; parameters: ZeRO-3 alone
    expert_parallel: Annotated[int, Field(ge=1)] = 1  # ranks that divide a sparse student's experts; 1: all have all
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0  # of the sample order, of new weights and of dropout
    chunk_logits: Annotated[int, Field(ge=1)] = 2**27  # of the head in memory at once, 4 bytes each
    memory_mb: Annotated[int, Field(ge=0)] = 512  # MiB a rank: half decoded rows, half image features (or pixels)
    shuffle_rows: Annotated[int, Field(ge=1)] = WINDOW_ROWS  # rows mixed at a time, some 270 bytes each
    log_every: Annotated[int, Field(ge=1)] = 10  # steps
    track: tuple[Tracker, ...] = ("tensorboard",)  # besides metrics.jsonl
    explosion_factor: Annotated[float, Field(gt=1)] | None = 10.0  # of the last steps' median loss: stops
    checkpoints: CheckpointsSection | None = None
    save_every: Annotated[int, Field(ge=1)] | None = None  # steps; the state to resume from. SIGTERM saves in any case
    keep_states: Annotated[int, Field(ge=1)] = 1  # the newest ones, while the stage runs
    num_processes: Annotated[int, Field(ge=1)] = 1  # ranks that `stillhouse train` asks torchrun for

    @model_validator(mode="after")
    def _exactly_one_length(self) -> StageSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self

    @model_validator(mode="after")
    def _cache_or_caches(self) -> StageSection:
        if self.cache is not None and self.caches is not None:
            raise ValueError("give either cache or caches")
        return self

    def sources(self, cache_path: str) -> tuple[SourceSection, ...]:
        """The caches that this stage trains on, nothing left out; `cache_path` where it names none."""
        given = self.caches or (SourceSection(path=self.cache or cache_path),)
        own = {"splits": self.splits, "filter": self.filter, "images": self.images}
        return tuple(
            each.model_copy(update={name: value for name, value in own.items() if getattr(each, name) is None})
            for each in given
        )

    @model_validator(mode="after")
    def _own_rates_of_what_trains(self) -> StageSection:
        trained = {*self.train, "mlp"} if "llm" in self.train else set(self.train)
        if idle := sorted(set(self.module_lr) - trained):
            raise ValueError(f"module_lr has {', '.join(idle)}, but only {', '.join(self.train)} train")
        return self

    @model_validator(mode="after")
    def _adapters_of_a_dense_decoder(self) -> StageSection:
        if self.lora and ("llm" not in self.train or "mlp" in self.train):
            raise ValueError(
                f"lora takes the place of whole weights where train says llm, but train is {', '.join(self.train)}; "
                "name layers that get adapters by lora.modules"
            )
        if self.lora and self.moe:
            raise ValueError("lora puts adapters into a dense decoder, but moe makes it sparse; leave one of them out")
        return self

    @model_validator(mode="after")
    def _average_of_whole_weights(self) -> StageSection:
        if self.ema is not None and self.zero_stage == 3:
            raise ValueError("ema averages whole weights, of which a rank has a piece under zero_stage 3; take 2")
        return self

    @model_validator(mode="after")
    def _held_out(self) -> StageSection:
        if self.checkpoints is None:
            return self
        trained = {split for source in self.sources("") for split in source.splits or ()}
        if both := sorted(trained & set(self.checkpoints.splits)):
            raise ValueError(f"checkpoints.splits are held out, but {', '.join(both)} is trained on")
        parts = [name for name in LossesSection.model_fields if name not in LOSS_OPTIONS and getattr(self.losses, name)]
        if self.checkpoints.metric not in ("loss", *parts):
            raise ValueError(
                f"checkpoints.metric is {self.checkpoints.metric!r}; this stage has loss, {', '.join(parts)}"
            )
        return self

    @model_validator(mode="after")
    def _fixed_micro_batches(self) -> StageSection:
        if self.losses.averaging == "micro_batch" and self.group_by_length:
            which = "literal" if self.losses.literal else "mean: micro_batch"
            raise ValueError(
                f"losses.{which} averages over micro-batches, and group_by_length makes these of samples of like "
                "length: the objective would depend on it; set group_by_length: false"
            )
        return self

    @model_validator(mode="after")
    def _possible_with_zero(self) -> StageSection:
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError("precision fp16 needs zero_stage 1, 2 or 3: the loss is scaled there; bf16 needs none")
        if self.offload and self.zero_stage == 0:
            raise ValueError(f"offload {', '.join(self.offload)} needs zero_stage 1, 2 or 3, but it is 0")
        if "parameters" in self.offload and self.zero_stage != 3:
            raise ValueError(f"offload parameters needs zero_stage 3, but it is {self.zero_stage}")
        return self

    @model_validator(mode="after")
    def _possible_with_divided_experts(self) -> StageSection:
        size = self.expert_parallel
        if size == 1:
            return self
        place = f"expert_parallel {size}"
        if self.zero_stage == 0:
            raise ValueError(
                f"{place} needs zero_stage 1, 2 or 3: DeepSpeed's norm of divided gradients is wrong with 0"
            )
        if not {"mlp", "llm"} & set(self.train):
            raise ValueError(f"{place} divides experts that train, but train is {', '.join(self.train)}; take 1")
        if self.lora is not None:
            raise ValueError(f"{place} divides experts, and lora adapts a dense decoder; leave one of them out")
        if self.ema is not None:
            raise ValueError(f"{place} leaves a rank some of the experts, and ema averages whole weights; take 1")
        if self.moe is not None and self.moe.experts % size:
            raise ValueError(f"{place} does not divide moe.experts, which is {self.moe.experts}")
        if self.num_processes > 1 and self.num_processes % size:
            raise ValueError(f"{place} does not divide num_processes, which is {self.num_processes}")
        return self


class EvaluationSection(Section):
    """Held-out test: generation against the reference answers, and fidelity to the cached teacher."""

    splits: tuple[str, ...] = ("test",)  # of cache.path, or after a stage of any of its caches
    images: LocalPath | None = None  # folder of images; default: the one that the cache names
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    batch: Annotated[int, Field(ge=1)] = 64  # samples
    turns: Literal["all", "first", "last"] = "all"  # answers judged; the sample's own earlier answers stand before each
