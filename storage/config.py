"""The `cache:` section of pipeline.yaml: where the cache lies and what is stored of each teacher row."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from storage.home_paths import expand_path
from storage.selection import METHODS, MethodName, Selection, Threshold, find_parameters, make_selection

Family = Literal["response", "visual", "relation", "sequence", "hidden", "images"]  # that a dump can make
LocalPath = Annotated[str, AfterValidator(expand_path)]  # `~` and `$VAR` become what they stand for on this machine


class Section(BaseModel):
    """A frozen configuration section that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SelectionSection(Section):
    """Selects the entries that are stored of each teacher distribution.

    `threshold` keeps every token with p >= tau exactly and any other with probability p / tau and weight
    tau, so that the expected row is the dense row. `topk` keeps the k most probable tokens, `mass` the
    fewest that reach a mass, `sampled` independent draws of the whole row (RS-KD).
    """

    method: MethodName = "threshold"
    tau: Annotated[float, Field(gt=0, lt=1)] = 0.01  # probability, threshold only
    k: Annotated[int, Field(ge=1, le=65535)] = 64  # entries a row, topk only
    mass: Annotated[float, Field(gt=0, lt=1)] = 0.99  # probability, mass only
    draws: Annotated[int, Field(ge=2, le=65535)] = 50  # a row, sampled only
    seed: Annotated[int, Field(ge=0)] = 0  # of the draws, threshold and sampled only
    draw_sets: Annotated[int, Field(ge=1, le=64)] = 1  # independent ones a row: epoch e trains on set e mod draw_sets
    temperatures: tuple[Annotated[float, Field(ge=0.01, le=100)], ...] = ()  # besides 1, whose log-sum-exp is kept
    rounding_kl: Annotated[float, Field(ge=0, le=0.1)] = 1e-3  # nats that rounding costs a row on average; 0: float32

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if 1 in values or len(set(values)) < len(values):
            raise ValueError(f"temperatures {values} must differ from 1 and from each other; 1 is always included")
        return values

    @model_validator(mode="after")
    def _check_draw_sets(self) -> SelectionSection:
        if self.draw_sets > 1 and not self.selection.samples_tail:
            raise ValueError(f"draw_sets {self.draw_sets} with method {self.method!r}, which draws nothing")
        return self

    @property
    def selection(self) -> Selection:
        """The method with its own parameters."""
        return make_selection(self.model_dump())

    def describe(self) -> dict[str, Any]:
        """Returns what an identity records: without the parameters of other methods, and of draws that are not made."""
        unused = set().union(*map(find_parameters, METHODS.values())) - find_parameters(METHODS[self.method])
        unused |= set() if self.selection.samples_tail else {"seed"}
        unused |= set() if self.draw_sets > 1 else {"draw_sets"}
        return self.model_dump(mode="json", exclude=unused)


class RelationSection(Section):
    """Chooses the encoding of relation matrices G / ||G||; their norms are stored as float32.

    `triangle_fp16` and `triangle_int8` store the upper triangle. `low_rank` stores the factor F of F F^T
    with the smallest rank that keeps 1 - cosine within `max_cosine_error`. `pooled` stores the matrix of
    visual rows averaged over blocks of the square grid; a student must average its rows in the same way.
    """

    centered: bool = False  # subtract the mean visual row first; the published loss does not
    encoding: Literal["triangle_fp16", "triangle_int8", "low_rank", "pooled"] = "triangle_fp16"
    max_cosine_error: Annotated[float, Field(ge=1e-6, le=0.5)] | None = None  # low_rank only; 1e-3
    factor_dtype: Literal["float16", "int8"] | None = None  # low_rank only; float16
    pool: Annotated[int, Field(ge=2, le=64)] | None = None  # side of a block in visual tokens, pooled only; 2

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        ours = _ENCODING_PARAMETERS.get(str(values.get("encoding")), {})
        return {**values, **{name: value for name, value in ours.items() if values.get(name) is None}}

    @model_validator(mode="after")
    def _refuse_unused_parameters(self) -> RelationSection:
        for encoding, parameters in _ENCODING_PARAMETERS.items():
            for name in parameters:
                if encoding != self.encoding and getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to encoding {encoding!r}, but encoding is {self.encoding!r}")
        return self


_ENCODING_PARAMETERS: dict[str, dict[str, Any]] = {
    "low_rank": {"max_cosine_error": 1e-3, "factor_dtype": "float16"},
    "pooled": {"pool": 2},
}


class HiddenSection(Section):
    """Chooses the encoding of the final-norm hidden states of response rows."""

    encoding: Literal["float16", "int8"] = "float16"  # int8 with a float32 scale a row


class BudgetSection(Section):
    """Limits the error or the size of rows; tau and rounding_kl are then chosen to fit the limit.

    The teacher scores a slice of the plan before the cache is created, and the choice follows from that.
    The choice and its predicted error and size become part of the cache's identity; a resumed dump keeps
    them. Exactly one of `gradient_error` and `bytes_per_row` must be given.
    """

    gradient_error: Annotated[float, Field(gt=0, lt=1)] | None = None  # relative, over `rows` rows, of a proxy student
    bytes_per_row: Annotated[float, Field(gt=0)] | None = None  # of the family's file
    families: tuple[Literal["response", "visual"], ...] = ("response",)  # of threshold selection
    rows: Annotated[int, Field(ge=1)] = 8192  # that gradient_error is meant for: four times as many halve it, at best
    samples: Annotated[int, Field(ge=1)] = 64  # of the slice, spread evenly over the plan

    @model_validator(mode="after")
    def _check_limits(self) -> BudgetSection:
        if (self.gradient_error is None) == (self.bytes_per_row is None) or not self.families:
            raise ValueError("give either gradient_error or bytes_per_row, and at least one family")
        return self


class CacheSection(Section):
    """Says where the cache lies and what it stores of each family.

    A dump into an existing cache of the same samples adds the families that the cache lacks. A dump of
    other samples is refused, unless `append` is set: it then adds them as new parts.
    """

    path: LocalPath = "{run}/cache"  # a local folder, or s3://bucket/prefix
    append: bool = False
    families: tuple[Family, ...] = ("response", "visual", "relation")  # besides `tokens`, always there
    response: SelectionSection = SelectionSection()
    visual: SelectionSection = SelectionSection()
    relation: RelationSection = RelationSection()
    hidden: HiddenSection = HiddenSection()
    budget: BudgetSection | None = None  # replaces tau and rounding_kl of its families
    zstd_level: Annotated[int, Field(ge=1, le=19)] = 9

    @model_validator(mode="after")
    def _check_budget_families(self) -> CacheSection:
        for family in self.budget.families if self.budget else ():
            if family not in self.families or not isinstance(getattr(self, family).selection, Threshold):
                raise ValueError(f"budget.families names {family}; it must be in families, with method 'threshold'")
        return self
