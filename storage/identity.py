"""The identity of a cache: what it was made from. It must agree before data is added or read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from storage.config import HiddenSection, RelationSection
from storage.images.settings import OLD_PIXELS, PixelSettings
from storage.selection import Selection, make_selection

FORMAT_VERSION = 5  # becomes 1 with the first release; other versions are refused
NO_TEACHER = "none"  # `teacher_fingerprint` of a cache, or a segment, of tokens only
TEACHER_FIELDS = (  # that decide a teacher's outputs, besides its engine
    "teacher_fingerprint", "dtype", "tokenizer_fingerprint", "vocab_size", "chat_template_fingerprint",
    "image_preprocessing_fingerprint", "pixels", "image_processor", "image_token_id", "eos_token_ids",
)  # fmt: skip
LOCATION_FIELDS = ("teacher", "image_root")  # paths at the time of the dump; never compared, hashes are


class Identity(BaseModel):
    """The fingerprints and settings that determine the content of a cache.

    The fields in LOCATION_FIELDS are exceptions: they inform a person and are not compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    teacher: str  # folder or hub id, a place
    teacher_fingerprint: str  # content hash of weights and config; "none" when the cache holds tokens only
    dtype: str
    engine: str  # name and version
    tokenizer_fingerprint: str
    vocab_size: Annotated[int, Field(ge=1, le=2**31 - 1)]  # the tokenizer's real one; every id is below it
    chat_template_fingerprint: str
    image_preprocessing_fingerprint: str  # of the image processor's settings and of `pixels`
    pixels: PixelSettings | None = None  # None: no images
    image_processor: dict[str, Any] | None = None  # the teacher's size, mean, …; None as `pixels`
    image_token_id: int  # the placeholder that stands once for each image in `token_ids`
    eos_token_ids: tuple[int, ...]
    plan_fingerprint: str
    num_parts: Annotated[int, Field(ge=0, le=10**7)]
    image_root: str  # a place; Cache.image_root also finds a folder that was moved together with the cache
    selection: dict[str, dict[str, Any]]  # by family; of tokens: how they were made, and how a teacher answered

    @field_validator("selection")
    @classmethod
    def _check_methods(cls, selection: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for settings in selection.values():
            if "method" in settings:
                make_selection(settings)
        return selection

    def content_json(self) -> str:
        """Returns the identity as JSON without LOCATION_FIELDS, to compare or to hash."""
        return self.model_dump_json(exclude=set(LOCATION_FIELDS))


def compute_tokenizer_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """Returns the sha256 (hex) of a vocabulary: ASCII JSON of its [token, id] pairs, sorted by id.

    `vocabulary` maps tokens to ids and includes added tokens. The dump records the fingerprint and
    student training compares it, so that both agree on what an id means.
    """
    pairs = sorted(([token, number] for token, number in vocabulary.items()), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=True).encode()).hexdigest()


def compute_vocab_size(vocabulary: Mapping[str, int]) -> int:
    """Returns the highest id + 1. Rows of the output head beyond it are padding without probability."""
    return max(vocabulary.values()) + 1


def describe_differences(cache: Identity, run: Identity) -> list[str]:
    """Returns one line per field in which two identities differ, except LOCATION_FIELDS; empty if equal."""
    ours, theirs = (json.loads(identity.content_json()) for identity in (run, cache))
    return [
        line
        for name in Identity.model_fields
        for line in _list_differing_leaves(name, theirs.get(name), ours.get(name))
    ]


def _list_differing_leaves(name: str, cache: Any, run: Any) -> list[str]:
    if isinstance(cache, dict) and isinstance(run, dict):
        keys = [*cache, *(key for key in run if key not in cache)]
        return [line for key in keys for line in _list_differing_leaves(f"{name}.{key}", cache.get(key), run.get(key))]
    return [] if cache == run else [f"{name}: cache has {cache!r}, this run has {run!r}"]


def stored_pixels(identity: Identity) -> PixelSettings:
    """Returns the teacher's pixel settings; version 0 if none are recorded (as without images)."""
    return identity.pixels or OLD_PIXELS


def stored_template_arguments(identity: Identity) -> dict[str, Any]:
    """Returns the arguments that the chat template was rendered with."""
    return dict(identity.selection.get("tokens", {}).get("chat_template_arguments", {}))


def stored_relation(identity: Identity) -> RelationSection:
    """Returns the encoding settings of a cache's relation matrices."""
    return RelationSection.model_validate(identity.selection.get("relation", {}))


def stored_hidden(identity: Identity) -> HiddenSection:
    """Returns the encoding settings of a cache's hidden states."""
    return HiddenSection.model_validate(identity.selection.get("hidden", {}))


def stored_selection(identity: Identity, family: str) -> Selection | None:
    """Returns the method that selected a family's entries; None if the cache does not say."""
    settings = identity.selection.get(family, {})
    return make_selection(settings) if "method" in settings else None


def stored_tau(identity: Identity, family: str) -> float:
    """Returns the weight of one sampled draw in a family's rows; 0 if no entries are sampled."""
    selection = stored_selection(identity, family)
    return selection.draw_weight if selection else 0.0


def stored_draw_sets(identity: Identity, family: str) -> int:
    """Returns the number of independent draw sets of a family's rows; a reader gets one of them."""
    return int(identity.selection.get(family, {}).get("draw_sets", 1))


def stored_temperatures(identity: Identity, family: str) -> tuple[float, ...]:
    """Returns the temperatures, besides 1, whose log-sum-exp a family's rows store."""
    return tuple(float(temperature) for temperature in identity.selection.get(family, {}).get("temperatures", ()))


def stored_seed(identity: Identity, family: str) -> int:
    """Returns the seed of a family's draws and rounding; 0 if none is recorded."""
    return int(identity.selection.get(family, {}).get("seed", 0))


def stored_rounding_kl(identity: Identity, family: str) -> float:
    """Returns the mean KL divergence, in nats per row, that rounding may cost; 0 for float32."""
    return float(identity.selection.get(family, {}).get("rounding_kl", 0.0))
