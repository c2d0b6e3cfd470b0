"""`stillhouse inspect`: opens a cache, chooses samples, and renders them for a terminal, as a page or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stillhouse.inspection.cache_facts import collect_facts, convert_facts, find_least_sure
from stillhouse.inspection.sample_text import format_facts, format_sample
from stillhouse.inspection.sample_view import build_sample_view, convert_view, find_sample
from stillhouse.inspection.token_texts import load_token_texts
from storage.backends.folder import write_atomically
from storage.errors import ConfigError
from storage.identity import stored_pixels
from storage.reader.cache import Cache

NUM_LEAST_SURE = 10
NUM_RANDOM = 4
RANDOM_SEED = 0  # the same cache gives the same page


def inspect_cache(
    path: str | Path,
    *,
    sample_ids: Sequence[str] = (),
    tokenizer: Path | None = None,
    images: Path | None = None,
    html: Path | None = None,
    as_json: bool = False,
) -> str:
    """The text for the terminal: of the cache, or of some of its samples. With `html` a page is written as well.

    `images` is a folder to use in place of the cache's image root. Checksums are not compared, which
    `stillhouse verify` does. Errors: ConfigError for an unknown sample or a tokenizer that is not the cache's;
    CacheError.
    """
    cache = Cache.open(path, checksums=False)
    indices = [find_sample(cache, sample_id) for sample_id in sample_ids]
    if html is not None:
        _write_page(cache, indices, tokenizer, images, html)
    if as_json:
        document = convert_facts(collect_facts(cache))
        if indices:
            texts = load_token_texts(cache.identity, tokenizer)
            samples = [convert_view(build_sample_view(cache, index, texts)) for index in indices]
            document |= {"texts": texts.note, "samples": samples}
        return json.dumps(document)
    if html is not None:
        return str(html)
    if not indices:
        return format_facts(collect_facts(cache))
    texts = load_token_texts(cache.identity, tokenizer)
    samples = [format_sample(build_sample_view(cache, index, texts)) for index in indices]
    return "\n\n\n".join([f"({texts.note})", *samples])


def _write_page(cache: Cache, indices: Sequence[int], tokenizer: Path | None, images: Path | None, html: Path) -> None:
    from stillhouse.inspection.cache_page import SampleGroup, render_cache_page  # matplotlib: a second

    texts = load_token_texts(cache.identity, tokenizer)
    groups = [
        SampleGroup(title, note, [build_sample_view(cache, index, texts) for index in chosen])
        for title, note, chosen in ([("Samples", "as asked for", indices)] if indices else _choose_samples(cache))
    ]
    page = render_cache_page(
        collect_facts(cache),
        groups,
        image_root=images or cache.image_root,
        follows_links=images is not None or cache.follows_image_links,
        pixels=stored_pixels(cache.identity),
        note=texts.note,
    )
    try:
        write_atomically(html, page.encode())
    except OSError as error:
        raise ConfigError(f"--html {html}: cannot be written: {error.strerror}") from error


def _choose_samples(cache: Cache) -> list[tuple[str, str, Sequence[int]]]:
    """Title, note and positions of the groups of an overview; no group is empty."""
    least_sure = []
    if "response" in cache.families:
        least_sure = [index for index, _ in find_least_sure(cache, NUM_LEAST_SURE)]
    others = np.setdiff1d(np.arange(cache.num_samples), least_sure)
    size = min(NUM_RANDOM, len(others))
    drawn = sorted(np.random.default_rng(RANDOM_SEED).choice(others, size, replace=False).tolist()) if size else []
    note = "answers by falling mean entropy of the teacher's distributions"
    groups = [
        ("Where the teacher was least sure", note, least_sure),
        ("At random", "drawn with a fixed seed", drawn),
    ]
    return [group for group in groups if group[2]]
