"""The engine's hidden states of the slice, in memory and in a file of the run's folder between the two processes.

The file is safetensors: `0.response` (r, d) and `0.visual.1` (n, d) of the second image of sample 0, …; its metadata
hold the key of what was scored, and ids, fingerprints and errors as JSON. It is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from storage.backends.folder import write_atomically
from storage.records.records import SampleError
from teacher_dump.data.partition import Part
from teacher_dump.engine_check.slice_choice import CheckTask, select_checked_rows
from teacher_dump.prompts.preparation import PreparedSample
from teacher_dump.signals.scoring import PartScorer


@dataclass(frozen=True, eq=False)
class CheckedStates:
    """The compared hidden states of one sample."""

    sample_id: str
    fingerprint: str  # of token ids and images
    response: Tensor  # (r, d)
    visual: tuple[Tensor, ...]  # (n, d) by image


@dataclass(frozen=True, eq=False)
class EngineStates:
    """The states of all samples that an engine accepted, and errors of the others."""

    samples: tuple[CheckedStates, ...]
    unusable: tuple[SampleError, ...]  # samples without a prompt, of which the engine was not asked
    errors: tuple[SampleError, ...]  # of the engine
    device: str  # such as cpu, or the name of a GPU


def score_slice_states(scorer: PartScorer, task: CheckTask) -> EngineStates:
    """Scores the slice as a dump would, in the same calls of the engine. Runs in the engine's process."""
    states: list[CheckedStates] = []
    unusable: list[SampleError] = []
    errors: list[SampleError] = []
    for chunk in scorer.prepare_chunks(Part(0, task.samples)):
        scored = scorer.hidden_states(chunk.ready)
        unusable += chunk.errors
        errors += scored.errors
        states += [extract_checked_states(sample, own, task) for sample, own in scored.accepted]
    return EngineStates(tuple(states), tuple(unusable), tuple(errors), describe_device())


def extract_checked_states(sample: PreparedSample, states: Tensor, task: CheckTask) -> CheckedStates:
    """Extracts the compared rows of a sample's states, (T, d)."""
    rows = select_checked_rows(sample, whole_images=task.relation_centered is not None)
    response, *visual = (
        states[torch.from_numpy(positions)].float().cpu() for positions in (rows.response, *rows.visual)
    )
    return CheckedStates(sample.record.sample_id, compute_fingerprint(sample), response, tuple(visual))


def compute_fingerprint(sample: PreparedSample) -> str:
    """Computes a hash of a sample's token ids, response mask and images."""
    record = sample.record
    digest = hashlib.sha256(record.token_ids.tobytes() + record.response_mask.tobytes())
    digest.update("".join(image.sha256 for image in sample.images).encode())
    return digest.hexdigest()


def describe_device() -> str:
    """Returns the name of the device that a teacher in this process uses."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def write_states(path: Path, key: str, states: EngineStates) -> None:
    """Writes states atomically, under the key of what was scored."""
    tensors: dict[str, Tensor] = {}
    for number, sample in enumerate(states.samples):
        tensors[f"{number}.response"] = _narrow(sample.response)
        for image, own in enumerate(sample.visual):
            tensors[f"{number}.visual.{image}"] = _narrow(own)
    document = {
        "samples": [[sample.sample_id, sample.fingerprint, len(sample.visual)] for sample in states.samples],
        "unusable": [[error.sample_id, error.reason] for error in states.unusable],
        "errors": [[error.sample_id, error.reason] for error in states.errors],
        "device": states.device,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(tensors, {"key": key, "document": json.dumps(document)}))


def read_states(path: Path, key: str) -> EngineStates | None:
    """Reads the states that were written under this key; None if there are none, or the file is damaged."""
    try:
        with safe_open(path, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            if metadata.get("key") != key:
                return None
            document = json.loads(metadata["document"])
            samples = [
                CheckedStates(
                    sample_id,
                    fingerprint,
                    tensors.get_tensor(f"{number}.response").float(),
                    tuple(tensors.get_tensor(f"{number}.visual.{image}").float() for image in range(num_images)),
                )
                for number, (sample_id, fingerprint, num_images) in enumerate(document["samples"])
            ]
        unusable, errors = (
            tuple(SampleError(sample_id, reason) for sample_id, reason in document[name])
            for name in ("unusable", "errors")
        )
        return EngineStates(tuple(samples), unusable, errors, str(document["device"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


def _narrow(states: Tensor) -> Tensor:
    """Returns states as bfloat16 where that loses nothing, as an engine in that dtype gives them."""
    narrow = states.to(torch.bfloat16)
    return (narrow if torch.equal(narrow.float(), states) else states).contiguous()
