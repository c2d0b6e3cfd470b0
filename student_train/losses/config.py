"""The `losses:` section of a stage: divergences, what stands in for tokens that are not stored, weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from storage.config import Section
from storage.reader.narrowing import Narrowing

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation", "cross_entropy"]
Treatment = Literal["unbiased", "bucket", "profile", "truncate", "renormalise", "exact"]
# What one stored row can be asked for. The others would need what it lacks: an estimate that is unbiased in a
# divergence that is not linear in the teacher, or the teacher's mass where the student has some.
TREATMENTS: dict[Divergence, tuple[Treatment, ...]] = {
    "forward_kl": ("unbiased", "bucket", "profile", "truncate", "renormalise", "exact"),
    "cross_entropy": ("unbiased", "bucket", "profile", "truncate", "renormalise", "exact"),
    "skewed_kl": ("bucket", "profile", "truncate", "renormalise", "exact"),
    "jsd": ("bucket", "profile", "renormalise", "exact"),
    "total_variation": ("bucket", "profile", "renormalise", "exact"),
    "reverse_kl": ("bucket", "profile", "exact"),
}
Mean = Literal["rows", "samples", "micro_batch"]
LOSS_OPTIONS = ("mean", "literal", "unshifted_mask")  # fields of `losses` that change losses and are none
DRAWING_METHODS = ("threshold", "sampled")  # methods of `cache:` that draw from the tail


class DistributionLossSection(Section):
    """A divergence from cached teacher rows, and what stands in for the tokens that a row does not store.

    `unbiased` exact and sampled entries by weight: its mean over draws is the dense loss;
    `bucket` exact entries and one bucket for all other tokens: a lower bound, equal if all is stored;
    `profile` the unstored mass spread over the other tokens by the cache's tail profile;
    `truncate` exact entries alone, as they are; `renormalise` exact entries scaled to sum to 1: both biased;
    `exact` no stored row but the family `hidden` and the teacher's head, every token (response only);
    `auto` unbiased where tails were drawn (methods threshold and sampled) and the loss can use draws, else bucket.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0
    divergence: Divergence = "forward_kl"
    treatment: Treatment | Literal["auto"] = "auto"  # by benchmarks.retention: see LOG.md
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0  # of both sides; the loss is multiplied by its square
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None  # teacher's share of the mixture: jsd 0.5, skewed_kl 0.1
    k: Annotated[int, Field(ge=1)] | None = None  # read at most so many exact entries of a row; or
    tau: Annotated[float, Field(gt=0, lt=1)] | None = None  # read as if dumped with this higher threshold

    @model_validator(mode="after")
    def _refuse_senseless(self) -> DistributionLossSection:
        if self.treatment not in ("auto", *TREATMENTS[self.divergence]):
            raise ValueError(
                f"treatment {self.treatment!r} gives no {self.divergence!r}: "
                f"take one of {', '.join(TREATMENTS[self.divergence])}"
            )
        if self.treatment == "unbiased" and self.temperature != 1:
            raise ValueError(
                f"treatment 'unbiased' is of temperature 1, not {self.temperature:g}: a sampled entry has no stored "
                "probability that could be re-tempered; take bucket, profile or exact"
            )
        if self.beta is not None and self.divergence not in ("jsd", "skewed_kl"):
            raise ValueError(f"beta belongs to jsd and skewed_kl, but divergence is {self.divergence!r}")
        narrowing = self.narrowing  # ValueError for both at once
        if self.k is not None and self.treatment == "unbiased":
            raise ValueError("treatment 'unbiased' needs what was drawn from the tail, and k keeps nothing of it")
        if narrowing and self.treatment in ("profile", "exact"):
            raise ValueError(
                f"treatment {self.treatment!r} goes with the entries as they were dumped; leave k and tau out"
            )
        return self

    @property
    def narrowing(self) -> Narrowing | None:
        """What is read of a row, where that is less than is stored."""
        return Narrowing.of(k=self.k, tau=self.tau)

    def resolve_treatment(self, method: str | None) -> Treatment:
        """The treatment of rows that were selected by a method of `cache:`."""
        if self.treatment != "auto":
            return self.treatment
        takes_draws = "unbiased" in TREATMENTS[self.divergence] and self.temperature == 1 and self.k is None
        return "unbiased" if takes_draws and method in DRAWING_METHODS else "bucket"


class RelationLossSection(Section):
    """1 - cosine between the teacher's and the student's relation matrices, per image."""

    weight: Annotated[float, Field(gt=0)] = 1.0


class BalanceLossSection(Section):
    """Load balance of a sparse student's routers, summed over layers, and their z-loss.

    `literal` is LLaVA-MoD's published code: an expert's share is that of the tokens whose first choice it is, not of
    both choices; the balance is added twice; and the two answers of a preference pair are balanced one by one and
    added. Left out: the Gumbel noise by which its routers draw the second expert, and the capacity beyond which it
    drops tokens (1.5 in training), since no standard checkpoint can express them.
    """

    weight: Annotated[float, Field(gt=0)] = 0.01  # a layer; the paper's
    z_weight: Annotated[float, Field(ge=0)] = 0.0  # ST-MoE takes 1e-3
    literal: bool = False


class PreferenceLossSection(Section):
    """Preference distillation on pairs of a chosen and a rejected answer, the cached teacher as the reference.

    `kl_reference` is whose mean log-ratio kto_pair subtracts: each pair's own (the published scripts run
    batch 1), that of the pairs of a forward pass, or of all ranks' forward passes at once.
    """

    kind: Literal["kto_pair", "dpo", "ipo"] = "kto_pair"
    weight: Annotated[float, Field(gt=0)] = 1.0
    beta: Annotated[float, Field(gt=0)] = 0.1
    kl_reference: Literal["pair", "batch", "global"] = "pair"  # kto_pair only
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # dpo only: the share of pairs the wrong way round


class LossesSection(Section):
    """Weights of the losses; one that is absent is not computed, and its family is not read.

    `mean` says what weighs the same in a loss of rows: every `rows` of the global batch (a sum over its rows), every
    one of its `samples` (the mean of each sample's mean), or every `micro_batch` (the mean of their means, as the
    published scripts have it: with one sample a micro-batch the same as `samples`). A sample or micro-batch without
    rows of a loss, such as a text without an image, adds 0 to the last two. Relation matrices are averaged alike.
    `literal` is LLaVA-KD's published code: `mean: micro_batch`, one cosine over the relation matrices of a whole
    micro-batch, and every weight 1. Two things differ: its losses run over the head's padded width, ours over the
    tokenizer's real vocabulary; and that SigLIP's first token is dropped there is a setting of the checkpoint.
    `unshifted_mask` is LLaVA-MoD's published code, for reproduction only: its mask of answers is not shifted with
    the rows, so the row that predicts an answer's first token is not distilled; an answer of one token, never. That
    mask also distils the row after an answer's last token, which no cache holds: that row is left out here.
    """

    cross_entropy: Annotated[float, Field(ge=0)] = 1.0  # L_reg, with the data set's labels
    response: DistributionLossSection | None = None  # L_res
    visual: DistributionLossSection | None = None  # L_vis
    relation: RelationLossSection | None = None  # L_rel
    mean: Mean = "rows"
    literal: bool = False
    unshifted_mask: bool = False
    balance: BalanceLossSection | None = None  # L_balance, of a sparse student
    preference: PreferenceLossSection | None = None  # on pairs alone: other losses on answers are then left out

    @model_validator(mode="after")
    def _at_least_one(self) -> LossesSection:
        if self.cross_entropy == 0 and not (self.response or self.visual or self.relation or self.preference):
            raise ValueError("no loss is left; give cross_entropy, response, visual, relation or preference")
        return self

    @model_validator(mode="after")
    def _possible(self) -> LossesSection:
        if self.visual is not None and self.visual.treatment == "exact":
            raise ValueError("visual.treatment 'exact' needs hidden states, which a cache holds of response rows alone")
        sections = {"response": self.response, "visual": self.visual, "relation": self.relation}
        weights = {name: section.weight for name, section in sections.items() if section is not None}
        weights |= {"cross_entropy": self.cross_entropy} if self.cross_entropy else {}
        if self.literal and any(weight != 1 for weight in weights.values()):
            raise ValueError(f"literal is the published code, whose weights are all 1, but they are {weights}")
        if self.literal and "mean" in self.model_fields_set and self.mean != "micro_batch":
            raise ValueError(f"literal is the published code, whose mean is 'micro_batch', but mean is {self.mean!r}")
        if self.unshifted_mask and self.response is None:
            raise ValueError("unshifted_mask is of the response loss, which is absent; give response, or leave it out")
        return self

    @property
    def averaging(self) -> Mean:
        """What weighs the same: `mean`, or that of the published code."""
        return "micro_batch" if self.literal else self.mean

    @model_validator(mode="after")
    def _pairs_alone(self) -> LossesSection:
        if self.preference and (self.cross_entropy or self.response or self.visual or self.relation):
            raise ValueError(
                "preference trains on pairs, half of them answers to avoid: set cross_entropy: 0 and no other"
            )
        return self
