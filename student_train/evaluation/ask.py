"""Answers one question about one image with any checkpoint, through its own chat template and processor."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import ConfigError, StillhouseError
from storage.identity import compute_vocab_size
from storage.images.placeholders import write_visual_tokens
from storage.images.settings import PixelSettings
from storage.records.prompt_ids import find_leading_special_ids, prepend_leading_ids
from storage.records.records import ImageRef, TokensRecord
from storage.records.sample_batch import SampleBatch
from storage.records.sample_key import SampleKey
from student_train.data.collate import collate_prompts
from student_train.data.sample_images import ImageFolder, TensorStore, VisionGatherer
from student_train.evaluation.generation import generate_greedily
from student_train.models.huggingface import load_processor
from student_train.models.loading import Checkpoint, load_for_inference, read_checkpoint
from student_train.models.student import Student


def answer_question(model_dir: str | Path, image_path: str | Path, question: str, max_new_tokens: int = 64) -> str:
    """Return the model's greedy answer. Keeps the model loaded for the next question.

    Errors: StillhouseError for a checkpoint, template or image that cannot be used; ConfigError for an
    architecture that is not supported, a folder without a checkpoint, a question that contains a special token.
    """
    checkpoint, processor, student = _load(str(model_dir))
    special = {token.content for token in checkpoint.tokenizer.added_tokens_decoder.values() if token.special}
    contained = sorted(text for text in special if text in question)
    if contained:
        raise ConfigError(f"the question contains the special token {contained[0]}, expected plain text; remove it")
    tokens = _build_prompt(processor, checkpoint, Path(image_path), question)
    pixels = checkpoint.pixels or PixelSettings()  # those it was trained with, if it names them
    folder = ImageFolder(Path(image_path).parent, checkpoint.image_processor, pixels=pixels)
    vision = VisionGatherer(folder, features=None, pixels=TensorStore(0))
    prompts = collate_prompts(SampleBatch.of_tokens([tokens]), checkpoint.sequence_format, vision.gather)
    (ids,) = generate_greedily(
        student,
        prompts.to(next(student.parameters()).device),
        max_new_tokens=max_new_tokens,
        eos_token_ids=_find_eos_token_ids(checkpoint, student) | _find_template_stop_ids(processor, checkpoint),
    )
    return checkpoint.tokenizer.decode(ids, skip_special_tokens=True).strip()


@lru_cache(maxsize=1)
def _load(model_dir: str) -> tuple[Checkpoint, Any, Student]:
    checkpoint = read_checkpoint(model_dir)
    processor = load_processor(model_dir)
    if getattr(processor, "chat_template", None) is None:
        raise StillhouseError(f"{model_dir}: has no chat template; add a chat_template.jinja")
    vocab_size = compute_vocab_size(checkpoint.tokenizer.get_vocab())
    return checkpoint, processor, load_for_inference(checkpoint, vocab_size=vocab_size)


def _build_prompt(processor: Any, checkpoint: Checkpoint, image: Path, question: str) -> TokensRecord:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    try:
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            **checkpoint.template_arguments,
        )
    except Exception as error:  # templates raise whatever they like through Jinja
        raise StillhouseError(
            f"{checkpoint.folder}: the chat template cannot render the question: {error}; give it a multimodal template"
        ) from error
    text = write_visual_tokens(text, processor)
    ids = checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"]
    token_ids = np.array(prepend_leading_ids(ids, find_leading_special_ids(checkpoint.tokenizer)), np.int32)
    num_image_tokens = int(np.count_nonzero(token_ids == checkpoint.sequence_format.image_token_id))
    if num_image_tokens != 1:
        raise StillhouseError(
            f"{checkpoint.folder}: its chat template writes {num_image_tokens} image tokens for one image and "
            f"{question!r}, expected 1; ask without image markers, or give it a multimodal template"
        )
    return TokensRecord(
        SampleKey("question"), "", "", token_ids, np.zeros(len(token_ids), bool), (_make_image_ref(image, checkpoint),)
    )


def _make_image_ref(image: Path, checkpoint: Checkpoint) -> ImageRef:
    try:
        sha256 = hashlib.sha256(image.read_bytes()).hexdigest()
    except OSError as error:
        raise StillhouseError(f"{image}: cannot be read: {error.strerror}") from error
    return ImageRef(image.name, sha256, checkpoint.sequence_format.tokens_per_image or 1, key=sha256)


def _find_eos_token_ids(checkpoint: Checkpoint, student: Student) -> set[int]:
    configured = getattr(student.model.generation_config, "eos_token_id", None)
    ids = {checkpoint.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return {token_id for token_id in ids if token_id is not None}


def _find_template_stop_ids(processor: Any, checkpoint: Checkpoint) -> set[int]:
    """Return the token that the chat template writes after an answer, with which students learn to stop."""
    items = {role: [{"type": "text", "text": text}] for role, text in (("user", "a"), ("assistant", "0"))}
    messages = [{"role": role, "content": content} for role, content in items.items()]
    try:
        text = processor.apply_chat_template(messages, tokenize=False, **checkpoint.template_arguments)
    except Exception:  # templates raise whatever they like; this one needs an image
        return set()
    closing = text.rpartition("0")[2].lstrip()
    added = checkpoint.tokenizer.added_tokens_decoder
    return {token_id for token_id, token in added.items() if closing.startswith(token.content)}
