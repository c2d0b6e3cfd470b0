"""The fused KD head against what it replaces, in memory and time: `python -m benchmarks.loss`.

Vocabulary 151,936, hidden size 896, float32 on a CPU, a head that trains; teacher rows as threshold sampling stores
them, 9 exact and 21 sampled ids a row. Each way goes from hidden states to the gradients of hidden states and head.
Memory is what a process of its own holds at its peak (resident, as the kernel counts), beyond what it held before and
the two gradients. Times are taken in turn, round by round; ratios are medians over rounds.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import Results, table, wants_json
from student_train.losses.fused_linear import HeadLossTask, fused_head_loss
from student_train.losses.sparse_divergence import LossSpec, TeacherRows

VOCABULARY, WIDTH = 151_936, 896
NUM_EXACT, NUM_SAMPLED, TAU = 9, 21, 0.01
MEMORY_ROWS, FEWER_ROWS = 4096, 2048
MEASURED = ("dense KD", "KD, fused")  # in memory: minutes each
TIMED_ROWS = 1024
ROUNDS = 3
UNBIASED = LossSpec(treatment="unbiased")


@dataclass(frozen=True, eq=False)
class Inputs:
    """A student's rows and head, labels, and the teacher's rows, of k entries each."""

    hidden: Tensor  # (r, d)
    weight: Tensor  # (v, d)
    labels: Tensor  # (r,)
    teacher: TeacherRows


def make_inputs(num_rows: int) -> Inputs:
    """Random numbers of the shapes and sizes that training has."""
    draw = torch.Generator().manual_seed(0)
    k = NUM_EXACT + NUM_SAMPLED
    ids = torch.randint(VOCABULARY // k, (num_rows, k), generator=draw) + torch.arange(k) * (VOCABULARY // k)
    exact = torch.rand(num_rows, NUM_EXACT, generator=draw).sort(dim=1, descending=True).values + 0.1
    logprobs = torch.cat([(0.79 * exact / exact.sum(1, keepdim=True)).log(), torch.full((num_rows, 21), TAU).log()], 1)
    teacher = TeacherRows(
        offsets=torch.arange(num_rows + 1) * k,
        ids=ids.flatten(),
        logprobs=logprobs.flatten(),
        num_exact=torch.full((num_rows,), NUM_EXACT),
        tail_mass=torch.full((num_rows,), 0.21),
        entropy=torch.full((num_rows,), 3.0),
        log_sum_exp=torch.zeros(num_rows, 0),
    )
    return Inputs(
        hidden=torch.randn(num_rows, WIDTH, generator=draw).requires_grad_(),
        weight=(torch.randn(VOCABULARY, WIDTH, generator=draw) * 0.03).requires_grad_(),
        labels=ids[:, 0].contiguous(),
        teacher=teacher,
    )


def dense_kd(inputs: Inputs) -> Tensor:
    """Forward KL with a densified target and the log-softmax of all rows."""
    log_q = (inputs.hidden @ inputs.weight.T).log_softmax(1)
    target = torch.zeros_like(log_q)
    target[inputs.teacher.row_of_entry(), inputs.teacher.ids] = inputs.teacher.logprobs.exp()
    return -(target * log_q).sum() - inputs.teacher.entropy.sum()


def sparse_kd(inputs: Inputs) -> Tensor:
    """Forward KL with the student's logarithms gathered at the stored ids."""
    logits = inputs.hidden @ inputs.weight.T
    row = inputs.teacher.row_of_entry()
    log_q = logits[row, inputs.teacher.ids] - logits.logsumexp(1)[row]
    return -(inputs.teacher.logprobs.exp() * log_q).sum() - inputs.teacher.entropy.sum()


def cross_entropy(inputs: Inputs) -> Tensor:
    """Plain fine-tuning, by PyTorch."""
    return F.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.labels, reduction="sum")


def fused_cross_entropy(inputs: Inputs) -> Tensor:
    """Plain fine-tuning through our head."""
    return fused_head_loss(inputs.weight, [HeadLossTask(inputs.hidden, inputs.labels)])[0]


def fused_kd(inputs: Inputs) -> Tensor:
    """The same forward KL as the first two."""
    return fused_head_loss(inputs.weight, [HeadLossTask(inputs.hidden, None, inputs.teacher, UNBIASED)])[0]


def fused_both(inputs: Inputs) -> Tensor:
    """Cross-entropy and KL of the same rows, as training has them."""
    return fused_head_loss(inputs.weight, [HeadLossTask(inputs.hidden, inputs.labels, inputs.teacher, UNBIASED)])[0]


WAYS: dict[str, Callable[[Inputs], Tensor]] = {
    "dense KD": dense_kd,
    "sparse KD by gathering": sparse_kd,
    "cross-entropy, PyTorch": cross_entropy,
    "cross-entropy, fused": fused_cross_entropy,
    "KD, fused": fused_kd,
    "KD + cross-entropy, fused": fused_both,
}


def step(way: str, inputs: Inputs) -> float:
    """Forward and backward pass; returns the loss."""
    inputs.hidden.grad = inputs.weight.grad = None
    loss = WAYS[way](inputs)
    loss.backward()
    return float(loss.detach())


def extra_bytes(way: str, num_rows: int) -> int:
    """The peak of a process that makes one step, beyond inputs and gradients."""
    inputs = make_inputs(num_rows)
    WAYS[way](make_inputs(2)).backward()  # libraries and their workspaces are there
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak until now
    before = _status_bytes("VmRSS")
    step(way, inputs)
    gradients = sum(each.nbytes for each in (inputs.hidden, inputs.weight))
    return _status_bytes("VmHWM") - before - gradients


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_a_process(way: str, num_rows: int) -> int:
    """`extra_bytes` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(extra_bytes, (way, num_rows))


def times(inputs: Inputs) -> dict[str, list[float]]:
    """Seconds of a step of each way, round by round."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses = {}
    for _ in range(ROUNDS):
        for way in WAYS:
            start = time.perf_counter()
            losses[way] = step(way, inputs)
            seconds[way].append(time.perf_counter() - start)
    for kind in (
        ("dense KD", "sparse KD by gathering", "KD, fused"),
        ("cross-entropy, PyTorch", "cross-entropy, fused"),
    ):
        spread = max(losses[way] for way in kind) - min(losses[way] for way in kind)
        assert spread < 1e-4 * losses[kind[0]], losses
    return seconds


def main() -> None:
    """Measure, print, and exit."""
    as_json = wants_json(__doc__ or "")
    results = Results("loss")
    memory = {way: in_a_process(way, MEMORY_ROWS) for way in MEASURED}
    fewer = in_a_process("KD, fused", FEWER_ROWS)
    seconds = times(make_inputs(TIMED_ROWS))

    def ratio(ours: str, theirs: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True))

    results.metrics = {
        "memory_over_dense": memory["KD, fused"] / memory["dense KD"],
        "memory_growth": memory["KD, fused"] / fewer,
        "time_over_dense": ratio("KD, fused", "dense KD"),
        "time_over_sparse": ratio("KD, fused", "sparse KD by gathering"),
        "time_over_ce": ratio("KD, fused", "cross-entropy, PyTorch"),
        "time_of_both_over_ce": ratio("KD + cross-entropy, fused", "cross-entropy, PyTorch"),
    }
    results.details = {
        way: {"extra_bytes": memory.get(way), "seconds": [round(each, 3) for each in seconds[way]]} for way in WAYS
    }
    lines = []
    for way in WAYS:
        used = f"{memory[way] / 1e6:.0f}" if way in memory else ""
        lines.append([way, used, f"{statistics.median(seconds[way]):.2f}", f"{ratio(way, 'dense KD'):.3f}"])
    header = ("", f"MB beyond, {MEMORY_ROWS} rows", f"s, {TIMED_ROWS} rows", "of dense KD")
    print(table(header, lines))
    results.print(as_json=as_json)


if __name__ == "__main__":
    main()
