"""One student, and its ways to train in one process: what `benchmarks.step` takes turns with.

Legend: r response rows, n visual rows of an image, d hidden, v vocabulary.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.online import OnlineObjective, teacher_head, teacher_states
from benchmarks.student_runs import make_stage_data
from benchmarks.teacher_caches import Asked
from storage.reader.cache import Cache
from student_train.data.batch_schedule import plan_micro_batches
from student_train.data.collate import collate
from student_train.data.mixture import Mixture
from student_train.losses.config import LossesSection
from student_train.models.huggingface import import_transformers
from student_train.models.loading import freeze, load_student, read_checkpoint
from student_train.models.student import Student
from student_train.training.objective import Objective
from student_train.training.stage_data import list_loss_families, load_cached_teacher

SCALES = (2, 8, 30)  # of a teacher's parameters over the student's
_KD = {"treatment": "unbiased"}
LOSSES: dict[str, dict[str, Any]] = {
    "sft": {},
    "response": {"response": _KD},
    "response, visual": {"response": _KD, "visual": _KD},
    "response, visual, relation": {"response": _KD, "visual": _KD, "relation": {}},
}


@dataclass(frozen=True)
class Subject:
    """A student, the cache that it trains on, and how it is measured."""

    name: str
    student: Path
    cache: Path
    batch: int
    rounds: int
    ways: tuple[str, ...]  # of LOSSES, or "online Nx"
    measured: tuple[str, ...]  # whose memory is


class Ways:
    """A student with everything that its ways of training need, open in this process."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        asked = Asked.open(subject.cache, subject.student)
        self._gather = asked.vision.gather
        checkpoint = read_checkpoint(subject.student)
        model = load_student(checkpoint, precision="fp32", device=torch.device("cpu"))
        freeze(model, ("projector", "llm"))
        self._grid, identity = checkpoint.sequence_format, asked.tokens.identity
        student = Student(
            model, vocab_size=identity.vocab_size, image_token_id=identity.image_token_id, features=asked.features
        )
        self.sizes = {"student": decoder_size(model)}
        self._table = make_stage_data(asked.tokens, checkpoint).table
        self._data: dict[str, Mixture] = {}
        self._families: dict[str, tuple[str, ...]] = {}
        self._objectives: dict[str, Objective] = {}
        for way in subject.ways:
            scale = way.removeprefix("online ").removesuffix("x")
            losses = LossesSection.model_validate(LOSSES["response" if scale.isdigit() else way])
            families = () if scale.isdigit() else list_loss_families(losses)
            stage_data = make_stage_data(Cache.open(subject.cache, families), checkpoint)
            self._families[way], self._data[way] = families, stage_data.mixture
            if scale.isdigit():
                teacher = Student(
                    random_teacher(model, int(scale)), vocab_size=identity.vocab_size,
                    image_token_id=identity.image_token_id, features=None,
                )  # fmt: skip
                self.sizes[way] = decoder_size(teacher.model)
                ask, head = partial(teacher_states, teacher), teacher_head(teacher)
                self._objectives[way] = OnlineObjective(student, losses, ask, head)
            else:
                known = load_cached_teacher(stage_data, losses)
                self._objectives[way] = Objective(student, losses, known, chunk_logits=1 << 27)
        self._parameters = [each for each in model.parameters() if each.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-4, weight_decay=0.0, fused=True)
        self._keep_features(student, asked)

    def _keep_features(self, student: Student, asked: Asked) -> None:
        """Run the frozen tower over all images, as a trainer's first epoch does."""
        for start in range(0, len(self._table), 64):
            samples = asked.tokens.read_many(self._table.indices[start : start + 64])
            with torch.no_grad():
                student.compute_tower_features(collate(samples, self._grid, self._gather).vision)

    def step(self, way: str, number: int) -> float:
        """One optimizer step on a batch of that number; returns its seconds."""
        size = self.subject.batch
        plan = next(
            plan_micro_batches(self._table, size, size, steps=range(number, number + 1), seed=0, rank=0, num_ranks=1)
        )
        started = time.perf_counter()
        samples = self._data[way].read_many(self._table.indices[plan.rows])
        batch = collate(samples, self._grid, self._gather, families=self._families[way])
        loss = self._objectives[way](batch, plan.totals, plan.largest)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        if not torch.isfinite(loss.detach()):
            raise RuntimeError(f"{self.subject.name}, {way}: the loss is {float(loss.detach())}")
        return seconds


def take_turns(ways: Ways) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each way, round by round, the order turning; and the sizes of student and teachers."""
    names = ways.subject.ways
    for way in names:
        ways.step(way, 0)  # the first step of each makes room
    seconds: dict[str, list[float]] = {way: [] for way in names}
    for number in range(ways.subject.rounds):
        first = number % len(names)
        for way in names[first:] + names[:first]:
            seconds[way].append(ways.step(way, number + 1))
    return seconds, ways.sizes


def peak_bytes(_: Path, *, subject: Subject) -> int:
    """What two steps of the subject's only way hold at most, beyond what this process held before."""
    (way,) = subject.ways
    nn.Linear(8, 8)(torch.ones(2, 8)).sum().backward()  # libraries' workspaces are there
    import_transformers()
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak until now
    ways = Ways(subject)
    for number in range(2):
        ways.step(way, number)
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def decoder_size(model: Any) -> int:
    """Parameters but for the tower's, tied ones once."""
    tower = {id(each) for each in model.model.vision_tower.parameters()}
    return sum(each.numel() for each in model.parameters() if id(each) not in tower)


def random_teacher(student: Any, scale: int) -> Any:
    """A frozen LLaVA of random weights with `scale` times the student's parameters, and its very tower."""
    transformers = import_transformers()
    config, text = student.config, student.config.text_config
    tied = bool(text.tie_word_embeddings)
    hidden, layers = shape(scale * decoder_size(student), vocab=text.vocab_size * (1 if tied else 2))
    described = {
        **text.to_dict(), "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 32, "head_dim": 32, "layer_types": None,
    }  # fmt: skip
    larger = transformers.LlavaConfig(
        vision_config=config.vision_config,
        text_config=type(text).from_dict(described),
        image_token_index=config.image_token_id,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(larger)
    model.model.vision_tower = student.model.vision_tower
    return model.requires_grad_(False).eval()


def shape(parameters: int, *, vocab: int) -> tuple[int, int]:
    """Hidden size and layers of a decoder with about so many parameters, some 40 of hidden size a layer.

    `vocab`: rows of embedding and head together. A layer has 16 hidden^2: attention, and an MLP four times as wide.
    """
    found = []
    for hidden, layers in itertools.product(range(64, 4096, 64), range(1, 80)):
        size = vocab * hidden + layers * 16 * hidden**2
        found.append((abs(size / parameters - 1) > 0.05, abs(np.log(hidden / layers / 40)), hidden, layers))
    _, _, hidden, layers = min(found)
    return hidden, layers
