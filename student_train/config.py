"""The `stages:` and `evaluation:` sections of pipeline.yaml: modules, data, losses and schedule of each stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from storage.config import LocalPath, Section
from storage.reader.shuffle import WINDOW_ROWS
from student_train.data.sample_filter import Condition, check_condition
from student_train.losses.config import LOSS_OPTIONS, LossesSection

# layers: those of the decoder, without its embeddings and head; mlp: of these layers, routers and experts too
Module = Literal["vision", "projector", "llm", "layers", "mlp"]
_CONTAINED: dict[Module, set[Module]] = {"llm": {"layers", "mlp"}, "layers": {"mlp"}}
Precision = Literal["fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
TEMPLATES = ("llava_kd", "llava_mod")  # chat templates of the two papers, in student_train/models/templates


class MoeSection(Section):
    """Sparse upcycling at the start of a stage: the MLP of each `every`-th layer is copied into experts."""

    experts: Annotated[int, Field(ge=2)] = 4
    top_k: Annotated[int, Field(ge=1)] = 2  # experts that process a token
    every: Annotated[int, Field(ge=1)] = 2  # layers 0, every, 2 * every, …

    @model_validator(mode="after")
    def _check_top_k(self) -> MoeSection:
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k is {self.top_k} but there are only {self.experts} experts; lower top_k or raise experts"
            )
        return self


class CompositionSection(Section):
    """Components that make up a student: directories or Hub ids. The two-layer GELU projector between them is new.

    The student is a LLaVA if the tower's hidden states are sequences (vision transformers), a FastVLM if its features
    are a map of channels, height and width (convolutional towers, such as those that timm_wrapper wraps).
    """

    vision: LocalPath  # a tower that transformers' AutoModel loads, or a whole SigLIP or CLIP; timm's need timm
    llm: LocalPath  # a causal decoder
    # tokenizer, chat template and image preprocessing: usually the teacher's; or give template instead
    processor: LocalPath | None = None
    # llava_kd, llava_mod or a .jinja file: makes a processor of it, of llm's tokenizer with `<image>` as one
    # token, and of vision's image preprocessing
    template: LocalPath | None = None
    pad_to_square: bool = False  # of a made processor: images are padded to a square with the mean colour, not cropped
    projector: Literal["mlp2x_gelu"] = "mlp2x_gelu"
    feature_layer: int | None = (
        None  # layer of the tower whose output the projector reads: by default -2, of a map the only one, -1
    )
    select: Literal["full", "default"] = "full"  # default drops the first position: CLIP's class token

    @model_validator(mode="after")
    def _check_processor(self) -> CompositionSection:
        if (self.processor is None) == (self.template is None):
            raise ValueError(
                "give either processor, a folder with tokenizer, chat template and image preprocessing, or template, "
                "of which a processor is made"
            )
        if self.template is not None and self.template not in TEMPLATES and not self.template.endswith(".jinja"):
            raise ValueError(f"template is {self.template!r}, expected {', '.join(TEMPLATES)} or a .jinja file")
        if self.pad_to_square and self.processor is not None:
            raise ValueError("pad_to_square is for a processor that template makes; the one given has its own settings")
        return self


class PrunedWidthSection(Section):
    """Widths that a pruned decoder keeps. Heads are not pruned. Neurons and channels of small weights go.

    A neuron of an MLP counts by the product of the L2 norms of its gate's row, its up projection's row and its down
    projection's column. A channel of the hidden states counts by what is written into it, summed over embedding (mean
    square), the layers' output and down projections (sum of squares of their rows) and the projector of images.
    Normalisation gains are multiplied by sqrt(old / new hidden_size), since removed channels no longer count as zeros.
    Source of the idea: Minitron, Muralidharan et al. 2024, who measure activations instead.
    """

    intermediate_size: Annotated[int, Field(ge=1)] | None = None  # neurons of each MLP
    hidden_size: Annotated[int, Field(ge=1)] | None = None  # channels of the hidden states

    @model_validator(mode="after")
    def _check_any_width(self) -> PrunedWidthSection:
        if self.intermediate_size is None and self.hidden_size is None:
            raise ValueError("width changes nothing; give intermediate_size, hidden_size or both")
        return self


class PruneSection(Section):
    """A smaller copy of a model's decoder: fewer layers, narrower ones, or both. Tower and projector of images stay.

    `choose` says which layers stay if `layers` is a number. `spaced`: evenly spaced ones, with the first and the last.
    `least_change`: those that change the hidden state most. A layer's change is 1 - cos(input, output), the mean over
    all tokens of some samples (block influence; ShortGPT, Men et al. 2024).
    """

    model: LocalPath  # a decoder, or a vision-language model; directory or Hub id
    layers: Annotated[int, Field(ge=1)] | Annotated[tuple[int, ...], Field(min_length=1)] | None = (
        None  # how many stay, or the numbers, from 0, of those that stay; null keeps all
    )
    choose: Literal["spaced", "least_change"] = "spaced"
    slice: Annotated[int, Field(ge=1)] = 64  # samples that the stage trains on, for least_change
    width: PrunedWidthSection | None = None

    @model_validator(mode="after")
    def _check_layers(self) -> PruneSection:
        if self.layers is None and self.width is None:
            raise ValueError("prune changes nothing; give layers, width or both")
        if isinstance(self.layers, tuple):
            if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
                raise ValueError(f"layers is {list(self.layers)}, expected rising numbers from 0 on, each once")
            if "choose" in self.model_fields_set:
                raise ValueError("choose is given, but layers already lists those that stay; remove one of them")
        return self

    @property
    def measures_change(self) -> bool:
        """Whether samples decide which layers stay."""
        return self.choose == "least_change" and isinstance(self.layers, int)


def _check_conditions(conditions: tuple[Condition, ...] | None) -> tuple[Condition, ...] | None:
    for condition in conditions or ():
        check_condition(condition)
    return conditions


# Conditions [column, comparison, value] on the columns of sample_filter.COLUMNS; all must hold
Filter = Annotated[tuple[Condition, ...], AfterValidator(_check_conditions)]


class SourceSection(Section):
    """One of several caches that a stage trains on. Omitted splits, filter and images are the stage's."""

    path: LocalPath
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0  # times that each sample occurs in an epoch
    splits: tuple[str, ...] | None = None
    filter: Filter | None = None
    images: LocalPath | None = None


class CheckpointsSection(Section):
    """Checkpoints that a stage writes while it runs, in <output>/checkpoints, and the best by a held-out loss."""

    every: Annotated[int, Field(ge=1)]  # steps; the last step's checkpoint is the stage's result
    keep_last: Annotated[int, Field(ge=0)] = 1  # newest ones to keep, as step-00000500
    splits: tuple[
        str, ...
    ] = ()  # held out of training; their losses are logged as held_out_*, and decide which is `best`
    samples: Annotated[int, Field(ge=1)] = 256  # number of held-out samples, the same ones each time
    metric: str = "loss"  # the loss or one of its parts; smallest is best

    @model_validator(mode="after")
    def _check_keeps_any(self) -> CheckpointsSection:
        if not self.keep_last and not self.splits:
            raise ValueError(
                "checkpoints keeps no checkpoint: keep_last is 0 and splits is empty; raise keep_last, or give the "
                "held-out splits whose loss decides which one is best"
            )
        return self


class LoraSection(Section):
    """Low-rank adapters that stand in for training `llm`, which must be in `train`; checkpoints hold them merged."""

    rank: Annotated[int, Field(ge=1)] = 128  # rank, alpha and dropout are LLaVA-1.5's
    alpha: Annotated[float, Field(gt=0)] = 256.0  # adapters are scaled by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class StageSection(Section):
    """One training stage: initial checkpoint, data, trained modules, losses and schedule."""

    init: LocalPath  # checkpoint directory or Hub id; `{seed}` becomes the stage's seed
    compose: CompositionSection | None = None  # composes the checkpoint at `init` if it does not exist yet
    prune: PruneSection | None = None  # prunes another checkpoint into the one at `init` if it does not exist yet
    output: LocalPath = "{run}/models/{stage}"  # checkpoint, metrics.jsonl, summary.json
    cache: LocalPath | None = None  # default: cache.path
    caches: Annotated[tuple[SourceSection, ...], Field(min_length=1)] | None = None  # instead of `cache`
    splits: tuple[str, ...] = ("train",)
    filter: Filter = ()  # conditions that trained samples meet
    images: LocalPath | None = None  # folder of images; default: the one that the cache names
    evaluation_cache: LocalPath | None = None  # cache of the held-out samples; default: those that the stage trains on
    train: Annotated[tuple[Module, ...], Field(min_length=1)] = ("projector", "llm")  # all other modules are frozen
    moe: MoeSection | None = None  # makes the dense student of `init` sparse
    lora: LoraSection | None = None  # trains adapters instead of the weights of `llm`
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay a step; checkpoints hold averaged weights
    losses: LossesSection = LossesSection()
    steps: Annotated[int, Field(ge=1)] | None = None  # optimizer steps; or
    epochs: Annotated[float, Field(gt=0)] | None = None  # passes over the splits
    global_batch: Annotated[int, Field(ge=1)] = 128  # samples an optimizer step, over all ranks
    micro_batch: Annotated[int, Field(ge=1)] = 16  # samples a forward pass, per rank
    group_by_length: bool = True  # group micro-batches of similar lengths: less padding, same mean
    lr: Annotated[float, Field(gt=0)] = 2e-5  # peak
    module_lr: dict[Module, Annotated[float, Field(gt=0)]] = {}  # peaks of modules with their own learning rate
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.03  # of the steps, then cosine to 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0  # of the global gradient
    precision: Precision = "bf16"  # fp16: dynamic loss scale; a step that overflows is skipped
    zero_stage: Literal[0, 1, 2, 3] = 2  # DeepSpeed ZeRO
    offload: tuple[Literal["optimizer", "parameters"], ...] = ()  # to CPU memory; parameters: ZeRO-3 only
    expert_parallel: Annotated[int, Field(ge=1)] = 1  # ranks that share a sparse student's experts; 1: not shared
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0  # of the sample order, of new weights and of dropout
    chunk_logits: Annotated[int, Field(ge=1)] = 2**27  # logits in memory at once, 4 bytes each
    memory_mb: Annotated[int, Field(ge=0)] = (
        512  # MiB a rank: half for decoded rows, half for image features (or pixels)
    )
    shuffle_rows: Annotated[int, Field(ge=1)] = WINDOW_ROWS  # rows of a shuffle window, about 270 bytes each
    log_every: Annotated[int, Field(ge=1)] = 10  # steps
    track: tuple[Tracker, ...] = ("tensorboard",)  # besides metrics.jsonl
    explosion_factor: Annotated[float, Field(gt=1)] | None = 10.0  # stop at this multiple of the recent median loss
    checkpoints: CheckpointsSection | None = None
    save_every: Annotated[int, Field(ge=1)] | None = None  # steps between saved states; SIGTERM always saves one
    keep_states: Annotated[int, Field(ge=1)] = 1  # the newest ones, while the stage runs
    num_processes: Annotated[int, Field(ge=1)] = 1  # ranks that `stillhouse train` asks torchrun for

    @model_validator(mode="after")
    def _check_one_length(self) -> StageSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self

    @model_validator(mode="after")
    def _check_one_maker(self) -> StageSection:
        if self.compose is not None and self.prune is not None:
            raise ValueError(
                "compose and prune would both make the checkpoint at init; compose in one stage, and prune its init "
                "or its output in another"
            )
        return self

    @model_validator(mode="after")
    def _check_not_both_cache_fields(self) -> StageSection:
        if self.cache is not None and self.caches is not None:
            raise ValueError("cache and caches are both given; remove one of them")
        return self

    def list_sources(self, cache_path: str) -> tuple[SourceSection, ...]:
        """Return the stage's caches, or `cache_path`, with the stage's splits, filter and images by default."""
        given = self.caches or (SourceSection(path=self.cache or cache_path),)
        own = {"splits": self.splits, "filter": self.filter, "images": self.images}
        return tuple(
            each.model_copy(update={name: value for name, value in own.items() if getattr(each, name) is None})
            for each in given
        )

    def list_evaluation_sources(self, cache_path: str) -> tuple[SourceSection, ...]:
        """Return the caches that the stage's result is evaluated on."""
        if self.evaluation_cache is None:
            return self.list_sources(cache_path)
        return (SourceSection(path=self.evaluation_cache, images=self.images),)

    @model_validator(mode="after")
    def _check_module_lr(self) -> StageSection:
        trained = set(self.train).union(*(_CONTAINED.get(module, set()) for module in self.train))
        if idle := sorted(set(self.module_lr) - trained):
            raise ValueError(
                f"module_lr names {', '.join(idle)}, but train is {', '.join(self.train)}; train these modules or "
                "remove them from module_lr"
            )
        return self

    @model_validator(mode="after")
    def _check_lora(self) -> StageSection:
        if self.lora and ("llm" not in self.train or {"layers", "mlp"} & set(self.train)):
            raise ValueError(
                f"lora replaces the training of llm and needs llm but not layers or mlp in train, which is "
                f"{', '.join(self.train)}; select the adapted layers with lora.modules"
            )
        if self.lora and self.moe:
            raise ValueError("lora adapts a dense decoder, but moe makes it sparse; remove one of them")
        return self

    @model_validator(mode="after")
    def _check_ema_sharding(self) -> StageSection:
        if self.ema is not None and self.zero_stage == 3:
            raise ValueError("ema needs whole weights on each rank, but zero_stage 3 shards them; set zero_stage: 2")
        return self

    @model_validator(mode="after")
    def _check_checkpoint_splits_and_metric(self) -> StageSection:
        if self.checkpoints is None:
            return self
        trained = {split for source in self.list_sources("") for split in source.splits or ()}
        if both := sorted(trained & set(self.checkpoints.splits)):
            raise ValueError(
                f"checkpoints.splits are held out, but {', '.join(both)} is trained on; remove it from one of them"
            )
        parts = [name for name in LossesSection.model_fields if name not in LOSS_OPTIONS and getattr(self.losses, name)]
        if self.checkpoints.metric not in ("loss", *parts):
            raise ValueError(
                f"checkpoints.metric is {self.checkpoints.metric!r}; this stage has loss, {', '.join(parts)}"
            )
        return self

    @model_validator(mode="after")
    def _check_averaging_without_grouping(self) -> StageSection:
        if self.losses.averaging == "micro_batch" and self.group_by_length:
            which = "literal" if self.losses.literal else "mean: micro_batch"
            raise ValueError(
                f"losses.{which} averages over micro-batches, so the objective would depend on how "
                "group_by_length composes them; set group_by_length: false"
            )
        return self

    @model_validator(mode="after")
    def _check_precision_and_offload(self) -> StageSection:
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError(
                "precision fp16 needs zero_stage 1, 2 or 3, but it is 0, where DeepSpeed does not scale "
                "the loss; raise it, or take bf16"
            )
        if self.offload and self.zero_stage == 0:
            raise ValueError(
                f"offload {', '.join(self.offload)} needs zero_stage 1, 2 or 3, but it is 0; raise it or remove offload"
            )
        if "parameters" in self.offload and self.zero_stage != 3:
            raise ValueError(
                f"offload parameters needs zero_stage 3, but it is {self.zero_stage}; set zero_stage: 3, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _check_expert_parallel(self) -> StageSection:
        size = self.expert_parallel
        if size == 1:
            return self
        place = f"expert_parallel {size}"
        if self.zero_stage == 0:
            raise ValueError(
                f"{place} needs zero_stage 1, 2 or 3, but it is 0, where DeepSpeed computes a wrong gradient norm for "
                "sharded experts; raise zero_stage"
            )
        if not {"mlp", "layers", "llm"} & set(self.train):
            raise ValueError(
                f"{place} shards trained experts, but train is {', '.join(self.train)}; set expert_parallel: 1"
            )
        if self.lora is not None:
            raise ValueError(f"{place} shards experts, but lora adapts a dense decoder; remove one of them")
        if self.ema is not None:
            raise ValueError(f"{place} shards experts, but ema needs whole weights on each rank; remove one of them")
        if self.moe is not None and self.moe.experts % size:
            raise ValueError(f"{place} does not divide moe.experts, which is {self.moe.experts}; change one of them")
        if self.num_processes > 1 and self.num_processes % size:
            raise ValueError(
                f"{place} does not divide num_processes, which is {self.num_processes}; change one of them"
            )
        return self


class EvaluationSection(Section):
    """Held-out evaluation: generated answers compared with references, and fidelity to the cached teacher."""

    splits: tuple[str, ...] = ("test",)  # of cache.path; after a stage, of its caches or its evaluation_cache
    images: LocalPath | None = None  # folder of images; default: the one that the cache names
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    batch: Annotated[int, Field(ge=1)] = 64  # samples
    turns: Literal["all", "first", "last"] = "all"  # answers to evaluate; prompts hold the sample's own earlier answers
