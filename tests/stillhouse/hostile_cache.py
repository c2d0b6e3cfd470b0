"""A sealed cache of a few samples with a real tokenizer and images, whose every text tries to run a script."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from storage.identity import compute_tokenizer_fingerprint, compute_vocab_size
from storage.processes import torchvision_shim
from storage.records.records import ImageRef, PartRecords, SampleError, TokensRecord, compute_image_key
from storage.records.sample_key import SampleKey
from storage.writer.cache_writer import CacheWriter
from student_train.models.huggingface import import_transformers
from tests.storage.synthetic_cache import TAU, make_identity, make_logits, make_relation, select
from tests.tiny import IMAGE_TOKEN, make_tiny_tokenizer

SCRIPT = "<script>document.title='owned'</script>"
HANDLER = "<img src=x onerror=\"document.title='owned'\">"
QUESTION = f"</span></div></section>{SCRIPT} what is it?"
ANSWER = f"{HANDLER} a bell \x07 & a <b>"
SAMPLE_ID = f'"><svg onload="document.title=1">{SCRIPT}'
CATEGORY = f"' onmouseover='x' {HANDLER}"
IMAGE_PATH = f"{HANDLER[:-1]}.png".replace("/", "")
REASON = f"broken: {SCRIPT}"
NUM_VISUAL_TOKENS = 9


def import_transformers_first() -> None:
    """As the command does it, which decides what transformers sees of other packages in this process."""
    torchvision_shim.import_torch_companions()  # other tests of the process want torchvision
    import_transformers()


def write_hostile_cache(folder: Path, *, num_samples: int = 3) -> Path:
    """The cache in <folder>/cache, its tokenizer in <folder>/teacher, its one image below <folder>/images."""
    import_transformers_first()
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(folder / "teacher")
    vocabulary = tokenizer.get_vocab()
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    identity = make_identity(
        num_parts=1,
        vocab_size=compute_vocab_size(vocabulary),
        teacher=str(folder / "teacher"),
        tokenizer_fingerprint=compute_tokenizer_fingerprint(vocabulary),
        image_token_id=image_token_id,
        image_root=str(folder / "images"),
    )
    (folder / "images").mkdir()
    file = folder / "images" / IMAGE_PATH
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(file, "png")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    draw = np.random.default_rng(0)
    prefix = [*tokenizer.encode("user\n"), image_token_id]
    key = compute_image_key(prefix, [sha256], "d" * 8)
    records, responses = [], []
    for number in range(num_samples):
        question, answer = tokenizer.encode(f"\n{QUESTION}\n"), tokenizer.encode(ANSWER)
        ids = np.array([*prefix, *question, *answer], np.int32)
        mask = np.arange(len(ids)) >= len(ids) - len(answer)
        image = ImageRef(IMAGE_PATH, sha256, NUM_VISUAL_TOKENS, key)
        records.append(TokensRecord(SampleKey(f"{SAMPLE_ID}{number}"), HANDLER, CATEGORY, ids, mask, (image,)))
        responses.append(select(make_logits(draw, len(answer), identity.vocab_size), tau=TAU, rng=draw, labels=True))
    visual = select(make_logits(draw, NUM_VISUAL_TOKENS, identity.vocab_size), tau=TAU, rng=draw, labels=False)
    writer = CacheWriter.open(folder / "cache", identity, ("response", "visual", "relation"))
    writer.write_part(
        0,
        PartRecords(
            tokens=records,
            response=responses,
            visual={key: visual},
            relation={key: make_relation(draw, NUM_VISUAL_TOKENS)},
            errors=[SampleError(f"lost {SCRIPT}", REASON)],
        ),
    )
    writer.seal()
    return folder / "cache"
