"""Evaluates a model on held-out samples: generated answers against references, and fidelity to the cached teacher.

`evaluation.turns` selects the turns of a conversation: all, the first or the last. A prompt ends before the evaluated
answer and holds the sample's own earlier answers.
"""

from __future__ import annotations

import itertools
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from storage.backends.folder import write_json
from storage.identity import stored_relation
from storage.reader.cache import Cache, read_identity
from storage.records.records import TokensRecord
from storage.records.sample_batch import SampleBatch
from student_train.config import EvaluationSection, SourceSection
from student_train.data.collate import collate, collate_prompts, cut_prompt, find_answer_spans
from student_train.data.mixture import CacheSource, Mixture
from student_train.data.sample_images import TensorStore, VisionGatherer
from student_train.evaluation.fidelity import Fidelity, compute_means, measure_fidelity
from student_train.evaluation.generation import generate_greedily
from student_train.evaluation.hallucination import compute_unsupported_rate, score_yes_no
from student_train.evaluation.relation_matrices import choose_samples, compare_relations
from student_train.losses.load_balancing import summarize_routers
from student_train.models.loading import Checkpoint, check_fit, load_for_inference, read_checkpoint
from student_train.models.student import Student
from student_train.training.stage_data import open_sealed_cache, select_samples_of_caches

MEMORY_BYTES = 512 << 20  # of image features, which the second pass reads again
PACKAGES = ("stillhouse", "torch", "transformers", "numpy", "pyarrow")  # whose versions an evaluation records
Item = TypeVar("Item")


def evaluate_model(model: str | Path, sources: Sequence[SourceSection], section: EvaluationSection) -> dict[str, Any]:
    """Write and return <model>/evaluation.json, over the samples of the section's splits in any of the caches.

    Of the sources, path and images count, the latter where the section names none. Closeness to the teacher is over
    the caches that hold its response. Errors: ConfigError (no sample in the splits), CacheError, IdentityError,
    StillhouseError.
    """
    started = time.monotonic()
    checkpoint = read_checkpoint(model)
    for source in sources:
        check_fit(checkpoint, read_identity(source.path))  # before a cache's index is read
    data = _open_held_out(sources, section)
    tokens = _read_tokens(data, section.batch)
    features = TensorStore(MEMORY_BYTES)
    images = data.images(checkpoint.image_processor)
    evaluator = _Evaluator(
        data=data,
        tokens=tokens,
        checkpoint=checkpoint,
        student=load_for_inference(checkpoint, vocab_size=data.identity.vocab_size, features=features),
        vision=VisionGatherer(images, features=features, pixels=TensorStore(0)),
        section=section,
    )
    samples = evaluator.generate_answers()
    fidelity = Fidelity.combine(
        [
            part
            for source, indices in zip(data.sources, data.indices_of_sources, strict=True)
            for part in evaluator.compute_fidelity(
                indices.tolist(), ("response",) if "response" in source.cache.families else ()
            )
        ]
    )
    relations = evaluator.compare_relations()
    document = {
        "num_samples": len(tokens),
        "turns": section.turns,
        "num_answers": len(samples),
        "exact_match": _average([sample["correct"] for sample in samples]),
        "by_category": _score_categories(samples, fidelity, tokens),
        "unsupported_rate": compute_unsupported_rate((sample["answer"], sample["reference"]) for sample in samples),
        "yes_no": score_yes_no((sample["answer"], sample["reference"]) for sample in samples),
        "routers": summarize_routers(fidelity.routers) if fidelity.routers else None,
        "cross_entropy": fidelity.cross_entropy,
        "kl_to_teacher": fidelity.kl,
        "top1_agreement": fidelity.agreement,
        "seconds": round(time.monotonic() - started, 3),
        "settings": section.model_dump(mode="json"),
        "caches": [str(source.cache.folder) for source in data.sources],
        "versions": {name: _find_version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "relations": relations,
        "samples": samples,
        "fidelity_by_sample": [sample.convert() for sample in fidelity.samples],
    }
    write_json(Path(model) / "evaluation.json", document)
    return document


def _open_held_out(sources: Sequence[SourceSection], section: EvaluationSection) -> Mixture:
    """Open the evaluated samples, each once even if a stage names its cache twice. A cache may have none."""
    sources = list({source.path: source for source in sources}.values())
    caches = []
    for source in sources:
        families = ("response",) if "response" in Cache.open(source.path, ()).families else ()
        caches.append(open_sealed_cache(source.path, families, max_bytes=MEMORY_BYTES // len(sources)))
    chosen = select_samples_of_caches(caches, section.splits)
    return Mixture(
        [
            CacheSource(cache, indices, images=section.images or source.images)
            for cache, indices, source in zip(caches, chosen, sources, strict=True)
        ]
    )


def _read_tokens(data: Mixture, batch_size: int) -> dict[int, TokensRecord]:
    """Read the tokens of each evaluated sample, by its index."""
    return {
        index: record.tokens
        for indices in data.indices_of_sources
        for piece in _split_batches(indices.tolist(), batch_size)
        for index, record in zip(piece, data.read_many(piece).records(), strict=True)
    }


@dataclass(frozen=True, eq=False)
class _Evaluator:
    """A model and the samples it is evaluated on."""

    data: Mixture
    tokens: dict[int, TokensRecord]
    checkpoint: Checkpoint
    student: Student
    vision: VisionGatherer
    section: EvaluationSection

    def generate_answers(self) -> list[dict[str, Any]]:
        """Generate and score the answer of each evaluated turn of each sample, in the order of `tokens`."""
        sequence_format, tokenizer = self.checkpoint.sequence_format, self.checkpoint.tokenizer
        prompts = {
            (index, turn): cut_prompt(record, image_token_id=sequence_format.image_token_id, answer=turn)
            for index, record in self.tokens.items()
            for turn in _select_turns(record, self.section.turns)
        }
        order = sorted(prompts, key=lambda place: (len(prompts[place].token_ids), place))  # little padding
        device = next(self.student.parameters()).device
        answers: dict[tuple[int, int], list[int]] = {}
        with tqdm(total=len(order), desc="answering", unit="answer", mininterval=1.0, leave=False) as bar:
            for batch in _split_batches(order, self.section.batch):
                cut = SampleBatch.of_tokens([prompts[place] for place in batch], [index for index, _ in batch])
                prompt_batch = collate_prompts(cut, sequence_format, self.vision.gather)
                continued = generate_greedily(
                    self.student,
                    prompt_batch.to(device),
                    max_new_tokens=self.section.max_new_tokens,
                    eos_token_ids=self.data.identity.eos_token_ids,
                )
                answers.update(zip(batch, continued, strict=True))
                bar.update(len(batch))
        results = []
        for index, turn in prompts:
            record = self.tokens[index]
            start, stop = find_answer_spans(record)[turn]
            answer = normalise_spaces(tokenizer.decode(answers[index, turn], skip_special_tokens=True))
            reference = normalise_spaces(tokenizer.decode(record.token_ids[start:stop], skip_special_tokens=True))
            results.append(
                {
                    "sample_id": record.sample_id,
                    "turn": turn,
                    "category": record.category,
                    "answer": answer,
                    "reference": reference,
                    "correct": answer == reference,
                }
            )
        return results

    @torch.inference_mode()
    def compute_fidelity(self, indices: Sequence[int], families: tuple[str, ...]) -> list[Fidelity]:
        """Compute the cross-entropy of the samples' response tokens, by batch.

        With the family `response`, also KL to the teacher and agreement with its most probable token.
        """
        order = sorted(indices, key=lambda index: (len(self.tokens[index].token_ids), index))
        device = next(self.student.parameters()).device
        parts = []
        for indices_of_batch in tqdm(
            _split_batches(order, self.section.batch), desc="comparing", unit="batch", mininterval=1.0, leave=False
        ):
            samples = self.data.read_many(indices_of_batch)
            batch = collate(samples, self.checkpoint.sequence_format, self.vision.gather, families=families).to(device)
            parts.append(measure_fidelity(self.student, batch))
        return parts

    def compare_relations(self) -> list[dict[str, Any]]:
        """Compute the student's relation matrix on a few images of the first cache that holds the teacher's."""
        starts = [0, *itertools.accumulate(source.cache.num_samples for source in self.data.sources)]
        for source, start in zip(self.data.sources, starts, strict=False):
            if "relation" not in Cache.open(str(source.cache.folder), ()).families:
                continue
            cache = Cache.open(str(source.cache.folder), ("relation",))
            chosen = choose_samples(cache, source.indices)
            if chosen:
                samples = self.data.read_many([start + index for index in chosen])
                records = cache.read_many(chosen).records()
                return compare_relations(
                    self.student,
                    self.checkpoint.sequence_format,
                    self.vision.gather,
                    samples,
                    [relation for record in records for relation in record.relation.values()],
                    centered=stored_relation(cache.identity).centered,
                )
        return []


def normalise_spaces(text: str) -> str:
    """Replace each run of white space by one space, and strip the text."""
    return " ".join(text.split())


def _score_categories(
    samples: Sequence[dict[str, Any]], fidelity: Fidelity, tokens: dict[int, TokensRecord]
) -> dict[str, dict[str, Any]]:
    """Score each category of samples by itself: exact match of answers, cross-entropy and KL of rows."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        hits[sample["category"]].append(sample["correct"])
    categories = {sample["sample_id"]: sample["category"] for sample in samples}
    return {
        name: {
            "num": len(of_name),
            "exact_match": _average(of_name),
            **compute_means(each for each in fidelity.samples if categories.get(each.sample_id) == name),
        }
        for name, of_name in sorted(hits.items())
    }


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _select_turns(tokens: TokensRecord, turns: str) -> Sequence[int]:
    count = max(1, len(find_answer_spans(tokens)))  # `cut_prompt` refuses a sample without answers
    return {"all": range(count), "first": [0], "last": [count - 1]}[turns]


def _split_batches(items: list[Item], size: int) -> list[list[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _average(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
