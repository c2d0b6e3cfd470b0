"""Checks a part's records before they are written, against each other and against the identity."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Protocol

import numpy as np

from storage.encoding.arrow_rows import check_token_ids
from storage.encoding.parquet_schema import FAMILIES
from storage.identity import Identity
from storage.records.preference_pairs import check_pairs, check_sequence
from storage.records.records import PartRecords, TokensRecord


class RecordsDescription(Protocol):
    """The families and the identity that records are checked against: of a segment or of cache.json."""

    @property
    def families(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> Identity: ...


def check_records(records: PartRecords, description: RecordsDescription) -> None:
    """Raises ValueError, naming the sample, if records contradict each other or the identity."""
    for family in FAMILIES[1:]:
        if (getattr(records, family) is None) == (family in description.families):
            raise ValueError(f"{family}: the records and the cache must either both have this family or both lack it")
    ids = Counter(record.sample_id for record in records.tokens)
    ids.update(error.sample_id for error in records.errors)
    twice = [sample_id for sample_id, count in ids.items() if count > 1]
    if twice:
        raise ValueError(f"sample ids appear more than once in one part: {twice[:5]}")
    for record in records.tokens:
        _check_tokens(record, description.identity)
    _check_images(records)
    if records.response is not None:
        if len(records.response) != len(records.tokens):
            raise ValueError(f"{len(records.response)} responses for {len(records.tokens)} samples")
        for record, rows in zip(records.tokens, records.response, strict=True):
            if rows.num_rows != record.num_response_tokens or rows.label_logprob is None:
                raise ValueError(
                    f"sample {record.sample_id}: {rows.num_rows} response rows for "
                    f"{record.num_response_tokens} response tokens, each with a label logprob"
                )
    _check_hidden(records)
    _check_measurements(records, description)
    if records.sequence is not None:
        if len(records.sequence) != len(records.tokens):
            raise ValueError(f"{len(records.sequence)} sequence logprobs for {len(records.tokens)} samples")
        for record, sequence in zip(records.tokens, records.sequence, strict=True):
            check_sequence(sequence, record)
        check_pairs(records.tokens)
    for rows in (records.visual or {}).values():
        if rows.label_logprob is not None:
            raise ValueError("visual rows have label logprobs, expected none")


def _check_tokens(record: TokensRecord, identity: Identity) -> None:
    ids, mask, place = record.token_ids, record.response_mask, f"sample {record.sample_id}"
    if ids.dtype != np.int32 or mask.dtype != np.bool_ or ids.ndim != 1 or ids.shape != mask.shape:
        raise ValueError(
            f"{place}: token_ids {ids.dtype}{ids.shape} and response_mask {mask.dtype}{mask.shape} "
            "must be int32[t] and bool[t]"
        )
    try:
        check_token_ids(ids, identity)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    placeholders = int(np.count_nonzero(ids == identity.image_token_id))
    if placeholders != len(record.images):
        raise ValueError(f"{place}: {placeholders} image placeholders for {len(record.images)} images")


def _check_images(records: PartRecords) -> None:
    num_tokens: dict[str, int] = {}
    for record in records.tokens:
        for image in record.images:
            if num_tokens.setdefault(image.key, image.num_visual_tokens) != image.num_visual_tokens:
                raise ValueError(f"sample {record.sample_id}: image {image.path} has two visual token counts")
    _check_image_files(records)
    for family in ("visual", "relation"):
        signals = getattr(records, family)
        if signals is None:
            continue
        if signals.keys() != num_tokens.keys():
            missing, extra = num_tokens.keys() - signals.keys(), signals.keys() - num_tokens.keys()
            raise ValueError(f"{family}: {len(missing)} image keys are missing, {len(extra)} are unknown")
        for key, signal in signals.items():
            rows = signal.num_rows if family == "visual" else len(signal.values)
            if rows != num_tokens[key]:
                raise ValueError(f"{family}: image {key} has {rows} rows for {num_tokens[key]} visual tokens")


def _check_hidden(records: PartRecords) -> None:
    if records.hidden is None:
        return
    if len(records.hidden) != len(records.tokens):
        raise ValueError(f"{len(records.hidden)} hidden states for {len(records.tokens)} samples")
    for record, states in zip(records.tokens, records.hidden, strict=True):
        if states.ndim != 2 or len(states) != record.num_response_tokens:
            raise ValueError(
                f"sample {record.sample_id}: hidden states {states.shape} for "
                f"{record.num_response_tokens} response tokens"
            )


def _check_measurements(records: PartRecords, description: RecordsDescription) -> None:
    """Raises ValueError for tail totals or teacher noise of families that the segment lacks."""
    held = {"response", "visual"} & set(description.families)
    strange = sorted({*records.tail_totals, *records.teacher_noise} - held)
    if strange:
        raise ValueError(f"tail totals or teacher noise of {strange}, expected some of {sorted(held)}")
    for family, tail in records.tail_totals.items():
        if tail.total.shape != (description.identity.vocab_size,):
            expected = description.identity.vocab_size
            raise ValueError(f"{family}: the tail total has {tail.total.shape} values, the vocabulary {expected}")


def _check_image_files(records: PartRecords) -> None:
    if records.images is None:
        return
    wanted = {image.sha256 for record in records.tokens for image in record.images}
    if records.images.keys() != wanted:
        missing, extra = wanted - records.images.keys(), records.images.keys() - wanted
        raise ValueError(f"images: {len(missing)} files are missing, {len(extra)} are unknown")
    for sha256, content in records.images.items():
        if hashlib.sha256(content).hexdigest() != sha256 or len(content) >= 1 << 31:
            raise ValueError(f"images: the {len(content)} bytes of {sha256} have another hash, or are 2 GiB or more")
