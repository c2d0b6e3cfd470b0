"""The `cache:` section of pipeline.yaml: where the cache lies and what is kept of each teacher row."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Family = Literal["response", "visual", "relation"]


class Section(BaseModel):
    """A frozen piece of configuration that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SelectionSection(Section):
    """Which entries of a teacher distribution are stored.

    `topk` keeps the k most probable tokens. `threshold` keeps every token with p >= tau exactly
    and any other with probability p / tau and weight tau, so that the expected row is the dense row.
    """

    method: Literal["topk", "threshold"] = "threshold"
    k: Annotated[int, Field(ge=1, le=65535)] = 64  # entries a row, topk only
    tau: Annotated[float, Field(gt=0, lt=1)] = 0.01  # probability, threshold only
    seed: Annotated[int, Field(ge=0)] = 0  # of the systematic draws, threshold only


class RelationSection(Section):
    """How relation matrices are kept: float16 upper triangle of G / ||G||, the norm in float32."""

    centered: bool = False  # subtract the mean visual row first; the published loss does not


class CacheSection(Section):
    """Where the cache lies, and what is stored of each family.

    A dump over a cache of the same samples adds the families that it lacks. With `append` a dump of other
    samples adds those as new parts; without it they are refused.
    """

    path: str = "{run}/cache"  # a local folder, or s3://bucket/prefix
    append: bool = False
    families: tuple[Family, ...] = ("response", "visual", "relation")  # besides `tokens`, always there
    response: SelectionSection = SelectionSection()
    visual: SelectionSection = SelectionSection()
    relation: RelationSection = RelationSection()
    zstd_level: Annotated[int, Field(ge=1, le=19)] = 9
