"""What a cache was made from: the fields that must agree before anything is added to it or read from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from storage.config import HiddenSection, RelationSection
from storage.images.settings import OLD_PIXELS, PixelSettings

FORMAT_VERSION = 4  # becomes 1 with the first release; other versions are refused
NO_TEACHER = "none"  # `teacher_fingerprint` of a cache, or a segment, of tokens only
PLACES = ("teacher", "image_root")  # where things lay when a segment was begun; hashes say what they are


class Identity(BaseModel):
    """Fingerprints and settings that decide every byte of a cache, except the order of the work.

    The fields in PLACES decide none: they help a person, and are compared with nothing.
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

    def content_json(self) -> str:
        """The identity as JSON without its places: text to compare, or to make a fingerprint of."""
        return self.model_dump_json(exclude=set(PLACES))


def tokenizer_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """What ids mean: sha256 of the vocabulary, added tokens included, as [token, id] pairs by id in ASCII JSON.

    The dump writes it and the student compares it, so both take it from here.
    """
    pairs = sorted(([token, number] for token, number in vocabulary.items()), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=True).encode()).hexdigest()


def real_vocab_size(vocabulary: Mapping[str, int]) -> int:
    """The highest id + 1: the rows of a head beyond it are padding, and get no probability."""
    return max(vocabulary.values()) + 1


def difference(cache: Identity, run: Identity) -> list[str]:
    """One line for each field, places excepted, in which two identities differ; empty when they agree."""
    ours, theirs = (json.loads(identity.content_json()) for identity in (run, cache))
    return [
        line for name in Identity.model_fields for line in _differing_leaves(name, theirs.get(name), ours.get(name))
    ]


def _differing_leaves(name: str, cache: Any, run: Any) -> list[str]:
    if isinstance(cache, dict) and isinstance(run, dict):
        keys = [*cache, *(key for key in run if key not in cache)]
        return [line for key in keys for line in _differing_leaves(f"{name}.{key}", cache.get(key), run.get(key))]
    return [] if cache == run else [f"{name}: cache has {cache!r}, this run has {run!r}"]


def stored_pixels(identity: Identity) -> PixelSettings:
    """How the teacher's pixels were made; version 0 where the identity does not say, as without images."""
    return identity.pixels or OLD_PIXELS


def stored_template_arguments(identity: Identity) -> dict[str, Any]:
    """The arguments that the chat template was given when the conversations were rendered."""
    return dict(identity.selection.get("tokens", {}).get("chat_template_arguments", {}))


def stored_relation(identity: Identity) -> RelationSection:
    """How a cache's relation matrices are encoded."""
    return RelationSection.model_validate(identity.selection.get("relation", {}))


def stored_hidden(identity: Identity) -> HiddenSection:
    """How a cache's hidden states are encoded."""
    return HiddenSection.model_validate(identity.selection.get("hidden", {}))


def stored_tau(identity: Identity, family: str) -> float:
    """The weight of one sampled draw in a family's rows; 0 where its selection stores no sampled entries."""
    selection = identity.selection.get(family, {})
    if selection.get("method") == "threshold":
        return float(selection["tau"])
    return 1 / int(selection["draws"]) if selection.get("method") == "sampled" else 0.0


def stored_draw_sets(identity: Identity, family: str) -> int:
    """How many independent sets of draws a family's rows have; a reader is given one of them."""
    return int(identity.selection.get(family, {}).get("draw_sets", 1))


def stored_temperatures(identity: Identity, family: str) -> tuple[float, ...]:
    """The temperatures, besides 1, whose log-sum-exp a family's rows carry."""
    return tuple(float(temperature) for temperature in identity.selection.get(family, {}).get("temperatures", ()))


def stored_seed(identity: Identity, family: str) -> int:
    """The seed of a family's draws and of its rounding; 0 where its selection records none."""
    return int(identity.selection.get(family, {}).get("seed", 0))


def stored_rounding_kl(identity: Identity, family: str) -> float:
    """What rounding a family's probabilities costs on average, in nats a row; 0 where they are float32."""
    return float(identity.selection.get(family, {}).get("rounding_kl", 0.0))
