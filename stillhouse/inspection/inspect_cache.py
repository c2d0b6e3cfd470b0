"""`stillhouse inspect`: opens a cache, finds the samples to look at, and renders terminal, page or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stillhouse.inspection import cache_facts, sample_view
from stillhouse.inspection.cache_facts import cache_facts as facts_of
from stillhouse.inspection.cache_facts import least_sure
from stillhouse.inspection.sample_text import facts_text, sample_text
from stillhouse.inspection.token_texts import token_texts
from storage.backends.folder import write_atomically
from storage.errors import ConfigError
from storage.identity import stored_pixels
from storage.reader.cache import Cache

NUM_LEAST_SURE = 10
NUM_RANDOM = 4
RANDOM_SEED = 0  # the same cache gives the same page


def inspect(
    path: Path,
    *,
    sample_ids: Sequence[str] = (),
    tokenizer: Path | None = None,
    images: Path | None = None,
    html: Path | None = None,
    as_json: bool = False,
) -> str:
    """What the terminal shows of a cache, or of some of its samples; with `html` a page is written as well.

    `images`: folder in place of the cache's image root. Bytes are looked at, not proven: that is what
    `stillhouse verify` does. Errors: ConfigError for an unknown sample or a tokenizer that is not the cache's;
    CacheError.
    """
    cache = Cache.open(path, checksums=False)
    indices = [sample_view.find_sample(cache, sample_id) for sample_id in sample_ids]
    if html is not None:
        _write_page(cache, indices, tokenizer, images, html)
    if as_json:
        document = cache_facts.as_json(facts_of(cache))
        if indices:
            texts = token_texts(cache.identity, tokenizer)
            views = [sample_view.sample_view(cache, index, texts) for index in indices]
            document |= {"texts": texts.note, "samples": [sample_view.as_json(view) for view in views]}
        return json.dumps(document)
    if html is not None:
        return str(html)
    if not indices:
        return facts_text(facts_of(cache))
    texts = token_texts(cache.identity, tokenizer)
    shown = [sample_text(sample_view.sample_view(cache, index, texts)) for index in indices]
    return "\n\n\n".join([f"({texts.note})", *shown])


def _write_page(cache: Cache, indices: Sequence[int], tokenizer: Path | None, images: Path | None, html: Path) -> None:
    from stillhouse.inspection.cache_page import Group, render_cache_page

    texts = token_texts(cache.identity, tokenizer)

    def group(title: str, note: str, chosen: Sequence[int]) -> Group:
        return Group(title, note, [sample_view.sample_view(cache, index, texts) for index in chosen])

    if indices:
        groups = [group("Samples", "as asked for", indices)]
    else:
        doubtful = []
        if "response" in cache.families:
            doubtful = [index for index, _ in least_sure(cache, NUM_LEAST_SURE)]
        others = np.setdiff1d(np.arange(cache.num_samples), doubtful)
        size = min(NUM_RANDOM, len(others))
        drawn = np.random.default_rng(RANDOM_SEED).choice(others, size, replace=False) if size else []
        groups = []
        if doubtful:
            note = "answers by falling mean entropy of the teacher's distributions"
            groups.append(group("Where the teacher was least sure", note, doubtful))
        if size:
            groups.append(group("At random", "drawn with a fixed seed", sorted(map(int, drawn))))
    page = render_cache_page(
        facts_of(cache),
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
