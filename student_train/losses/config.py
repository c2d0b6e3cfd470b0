"""The `losses:` section of a stage: divergences, tail handling (`treatment`) and weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from storage.config import Section
from storage.reader.narrowing import Narrowing
from storage.selection import Selection

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation", "cross_entropy"]
Treatment = Literal["unbiased", "bucket", "profile", "truncate", "renormalise", "exact"]
# The tail handling that a stored row allows for each divergence. The other combinations would need an unbiased
# estimate of a divergence that is not linear in the teacher, or the teacher's mass of tokens that are not stored.
TREATMENTS: dict[Divergence, tuple[Treatment, ...]] = {
    "forward_kl": ("unbiased", "bucket", "profile", "truncate", "renormalise", "exact"),
    "cross_entropy": ("unbiased", "bucket", "profile", "truncate", "renormalise", "exact"),
    "skewed_kl": ("bucket", "profile", "truncate", "renormalise", "exact"),
    "jsd": ("bucket", "profile", "renormalise", "exact"),
    "total_variation": ("bucket", "profile", "renormalise", "exact"),
    "reverse_kl": ("bucket", "profile", "exact"),
}
Mean = Literal["rows", "samples", "micro_batch"]
LOSS_OPTIONS = ("mean", "literal", "unshifted_mask")  # fields of `losses` that are options, not losses


class DistributionLossSection(Section):
    """A divergence from cached teacher rows; `treatment` is the tail handling, for tokens that are not stored.

    `unbiased`: weighted exact and sampled entries; its mean over draws is the dense loss.
    `bucket`: exact entries, and one bucket for all other tokens; a lower bound, and equal if all is stored.
    `profile`: spreads the mass of tokens that are not stored over them by the cache's tail profile.
    `truncate`: exact entries only, unchanged; biased. `renormalise`: exact entries scaled to sum to 1; biased.
    `exact`: every token, from the family `hidden` and the teacher's head instead of stored rows (response only).
    `auto`: unbiased if the cache sampled tails (methods threshold and sampled) and the loss allows it, else bucket.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0
    divergence: Divergence = "forward_kl"
    treatment: Treatment | Literal["auto"] = "auto"  # auto: measured with benchmarks.retention, see LOG.md
    temperature: Annotated[float, Field(ge=0.01, le=100)] = (
        1.0  # of teacher and student; the loss is multiplied by its square
    )
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None  # teacher's share of the mixture: jsd 0.5, skewed_kl 0.1
    k: Annotated[int, Field(ge=1)] | None = None  # read at most k exact entries of a row; or
    tau: Annotated[float, Field(gt=0, lt=1)] | None = None  # read as if dumped with this, higher, threshold

    @model_validator(mode="after")
    def _check_treatment(self) -> DistributionLossSection:
        if self.treatment not in ("auto", *TREATMENTS[self.divergence]):
            raise ValueError(
                f"treatment is {self.treatment!r}, which cannot give {self.divergence!r}; "
                f"take one of {', '.join(TREATMENTS[self.divergence])}"
            )
        if self.treatment == "unbiased" and self.temperature != 1:
            raise ValueError(
                f"treatment 'unbiased' needs temperature 1, but it is {self.temperature:g}: sampled entries have no "
                "stored probability to apply a temperature to; take bucket, profile or exact"
            )
        if self.beta is not None and self.divergence not in ("jsd", "skewed_kl"):
            raise ValueError(f"beta belongs to jsd and skewed_kl, but divergence is {self.divergence!r}")
        narrowing = self.narrowing  # ValueError for both at once
        if self.k is not None and self.treatment == "unbiased":
            raise ValueError("treatment 'unbiased' needs sampled entries, which k drops; remove k, or take tau")
        if narrowing and self.treatment in ("profile", "exact"):
            raise ValueError(f"treatment {self.treatment!r} needs the entries as they were dumped; remove k and tau")
        return self

    @property
    def narrowing(self) -> Narrowing | None:
        """The part of a stored row that is read; None for all of it."""
        return Narrowing.of(k=self.k, tau=self.tau)

    def resolve_treatment(self, selection: Selection | None) -> Treatment:
        """Return the tail handling for a cache's rows, selected by this method; resolves 'auto'."""
        if self.treatment != "auto":
            return self.treatment
        takes_draws = "unbiased" in TREATMENTS[self.divergence] and self.temperature == 1 and self.k is None
        return "unbiased" if takes_draws and selection is not None and selection.samples_tail else "bucket"


class RelationLossSection(Section):
    """1 - cosine between the teacher's and the student's relation matrix of each image."""

    weight: Annotated[float, Field(gt=0)] = 1.0


class BalanceLossSection(Section):
    """Load balance of a sparse student's routers, summed over layers, and their z-loss.

    `literal` follows LLaVA-MoD's published code: an expert's share counts first choices only, not both; the balance
    is added twice; and the balances of the two answers of a preference pair are computed separately and added. Not
    reproduced: the Gumbel noise that draws the second expert, and the capacity (1.5 in training) beyond which tokens
    are dropped, since no standard checkpoint can express them.
    """

    weight: Annotated[float, Field(gt=0)] = 0.01  # for each layer; the paper's value
    z_weight: Annotated[float, Field(ge=0)] = 0.0  # ST-MoE uses 1e-3
    literal: bool = False


class PreferenceLossSection(Section):
    """Preference distillation on pairs of a chosen and a rejected answer, with the cached teacher as the reference.

    `kl_reference`: the pairs over which kto_pair averages the log-ratios that it subtracts: each pair alone (the
    published scripts run batch 1), the pairs of a forward pass, or those of all ranks' forward passes.
    """

    kind: Literal["kto_pair", "dpo", "ipo"] = "kto_pair"
    weight: Annotated[float, Field(gt=0)] = 1.0
    beta: Annotated[float, Field(gt=0)] = 0.1
    kl_reference: Literal["pair", "batch", "global"] = "pair"  # kto_pair only
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # dpo only: assumed share of pairs in the wrong order


class LossesSection(Section):
    """The losses of a stage and their weights. An absent loss is not computed, and its family is not read.

    `mean`: what a loss of rows averages over: the `rows` of the global batch, its `samples` (the mean of each
    sample's mean), or each `micro_batch` (the mean of their means, as in the published scripts; the same as `samples`
    for one sample a micro-batch). A sample or micro-batch without rows of a loss, such as a text without an image,
    adds 0 to the last two. Relation matrices are averaged in the same way.
    `literal` follows LLaVA-KD's published code: `mean: micro_batch`, one cosine over the relation matrices of a
    whole micro-batch, and all weights 1. Two things differ: its losses cover the head's padded width, ours the
    tokenizer's real vocabulary; and dropping SigLIP's first token is a setting of the checkpoint here.
    `unshifted_mask` follows LLaVA-MoD's published code, for reproduction only: its response mask is not shifted with
    the rows, so the row that predicts an answer's first token is not distilled, and an answer of one token not at
    all. That mask also distils the row after an answer's last token, which caches do not hold; it is omitted here.
    """

    cross_entropy: Annotated[float, Field(ge=0)] = 1.0  # weight of L_reg, on the data set's labels
    response: DistributionLossSection | None = None  # L_res
    visual: DistributionLossSection | None = None  # L_vis
    relation: RelationLossSection | None = None  # L_rel
    mean: Mean = "rows"
    literal: bool = False
    unshifted_mask: bool = False
    balance: BalanceLossSection | None = None  # L_balance, of a sparse student
    preference: PreferenceLossSection | None = None  # on pairs; excludes other losses on answers

    @model_validator(mode="after")
    def _check_any_loss(self) -> LossesSection:
        if self.cross_entropy == 0 and not (self.response or self.visual or self.relation or self.preference):
            raise ValueError("all losses are off; give cross_entropy, response, visual, relation or preference")
        return self

    @model_validator(mode="after")
    def _check_options(self) -> LossesSection:
        if self.visual is not None and self.visual.treatment == "exact":
            raise ValueError(
                "visual.treatment 'exact' needs hidden states, which caches hold for response rows only; take bucket"
            )
        sections = {"response": self.response, "visual": self.visual, "relation": self.relation}
        weights = {name: section.weight for name, section in sections.items() if section is not None}
        weights |= {"cross_entropy": self.cross_entropy} if self.cross_entropy else {}
        if self.literal and any(weight != 1 for weight in weights.values()):
            raise ValueError(
                f"literal follows the published code, whose weights are all 1, but they are {weights}; set them to 1"
            )
        if self.literal and "mean" in self.model_fields_set and self.mean != "micro_batch":
            raise ValueError(
                f"literal follows the published code, whose mean is 'micro_batch', but mean is {self.mean!r}; remove it"
            )
        if self.unshifted_mask and self.response is None:
            raise ValueError("unshifted_mask needs the response loss, which is absent; give response, or remove it")
        return self

    @property
    def averaging(self) -> Mean:
        """What a loss averages over: `mean`, or micro-batches with `literal`."""
        return "micro_batch" if self.literal else self.mean

    @model_validator(mode="after")
    def _check_preference(self) -> LossesSection:
        if self.preference and (self.cross_entropy or self.response or self.visual or self.relation):
            raise ValueError(
                "preference trains on pairs, half of whose answers are to be avoided; set cross_entropy: 0 and remove "
                "response, visual and relation"
            )
        return self
