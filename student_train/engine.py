"""DeepSpeed behind a small surface, and its only importer: processes, gradients, optimizer, gathered weights.

On a CPU nothing is compiled. DeepSpeed would build a shared-memory collective with g++ (30 s, once a
machine), which serves its inference kernels alone; gloo does all of training's collectives. It would also
load torch.compile (3 s, every start) for Muon's kernels, to learn that AdamW is not Muon.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from storage.errors import StillhouseError
from student_train.config import StageSection

_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"
_LARGEST_BUCKET = 200_000_000  # elements of gradients that are reduced at once


@dataclass(frozen=True)
class Process:
    """Which of how many processes this one is, and where it computes."""

    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def this_process() -> Process:
    """As torchrun's environment says; alone without it. A GPU is taken if there is one."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    return Process(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)


class Engine:
    """A module that trains: DeepSpeed's engine, its process group, and what it prints kept in a file."""

    def __init__(
        self, module: nn.Module, stage: StageSection, process: Process, *, num_micro: int, log_path: Path
    ) -> None:
        """Join the other ranks and shard `module`'s optimizer as stage.zero_stage says.

        `num_micro`: forward passes an optimizer step. DeepSpeed's and gloo's messages go to `log_path`.
        """
        self.process = process
        self._log_path = log_path
        self._zero_stage = stage.zero_stage
        self._unwrapped = stage.zero_stage == 0 and stage.precision == "fp32"  # DeepSpeed keeps no norm then
        with quiet(log_path):
            self._deepspeed = _import_deepspeed(process)
            _join(process, self._deepspeed)
            parameters = [p for p in module.parameters() if p.requires_grad]
            optimizer = _adamw(parameters, stage)
            self._engine: Any = self._deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=_settings(stage, num_micro, sum(p.numel() for p in parameters)),
            )[0]
            for state in optimizer.state.values():  # it may have made a step with no gradient, to make room
                state["step"].zero_()

    def forward(self, *inputs: Any) -> Any:
        """The module's output, in train mode."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss that is this rank's share of a sum over ranks and micro-batches."""
        # DeepSpeed averages over ranks (and over micro-batches, unless told not to); ours are sums.
        self._engine.backward(loss * self.process.num_ranks, scale_wrt_gas=False)

    def step(self, lr: float) -> float | None:
        """Count a micro-batch; after the last update weights and return the gradient's norm, unclipped."""
        last = self._engine.is_gradient_accumulation_boundary()
        norm = self._unwrapped_norm() if last and self._unwrapped else 0.0
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if not last:
            return None
        return norm if self._unwrapped else float(self._engine.get_global_grad_norm())

    def _unwrapped_norm(self) -> float:
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over ranks; a collective."""
        return self._reduced(values, torch.distributed.ReduceOp.SUM)

    def max_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """The largest of each value over ranks; a collective."""
        return self._reduced(values, torch.distributed.ReduceOp.MAX)

    def _reduced(self, values: Mapping[str, float], operation: Any) -> dict[str, float]:
        if self.process.num_ranks == 1:
            return dict(values)
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.process.device)
        torch.distributed.all_reduce(packed, op=operation)
        return dict(zip(values, packed.tolist(), strict=True))

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Whole weights of a part of the module on the first rank, nothing on the others. A collective."""
        if self._zero_stage < 3:
            return dict(model.state_dict()) if self.process.is_first else {}
        gathered: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            with self._deepspeed.zero.GatheredParameters([parameter]):
                if self.process.is_first:
                    gathered[name] = parameter.detach().to("cpu", copy=True)
        if self.process.is_first:
            buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in gathered}
            gathered.update(buffers)
        return gathered

    def save_state(self, folder: Path) -> None:
        """What training needs to go on: trained weights and optimizer, in DeepSpeed's files. A collective."""
        with quiet(self._log_path):
            self._engine.save_checkpoint(
                str(folder.parent), folder.name, save_latest=False, exclude_frozen_parameters=True
            )

    def load_state(self, folder: Path) -> None:
        """Go on where `save_state` was called, on as many ranks. StillhouseError if the files are not whole."""
        with quiet(self._log_path):
            try:
                found, _ = self._engine.load_checkpoint(
                    str(folder.parent), folder.name, load_module_strict=False, load_lr_scheduler_states=False
                )
            except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
                raise StillhouseError(f"{folder}: cannot be read back: {error}; delete it to begin anew") from error
        if found is None:
            raise StillhouseError(f"{folder}: holds no state of DeepSpeed; delete it to begin anew")

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.process.num_ranks > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Let go of the module. The ranks stay joined, so that this process may train another stage."""
        self._engine.destroy()


@contextlib.contextmanager
def quiet(log_path: Path) -> Iterator[None]:
    """Within it, whatever Python or native code prints goes to the end of a file."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log_path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, number in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _import_deepspeed(process: Process) -> Any:
    if process.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # its own calls
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = importlib.import_module("deepspeed")
        with importlib.import_module("torch._dynamo").config.patch(disable=True):
            importlib.import_module(_MUON)
    if process.device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # the answer of a probe that found nothing to build
    return deepspeed


def _join(process: Process, deepspeed: Any) -> None:
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if process.device.type == "cuda" else "gloo"
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    if not torch.distributed.is_initialized():
        store = None if "MASTER_ADDR" in os.environ else _store_of_one()
        torch.distributed.init_process_group(backend, rank=process.rank, world_size=process.num_ranks, store=store)
        atexit.register(torch.distributed.destroy_process_group)
    deepspeed.init_distributed(backend)


def _store_of_one() -> Any:
    """What a process group without others meets in: no port is opened."""
    return importlib.import_module("torch.distributed").HashStore()


def _adamw(parameters: list[nn.Parameter], stage: StageSection) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]  # norms and biases do not decay
    decays = ((matrices, stage.weight_decay), (vectors, 0.0))
    groups = [{"params": group, "weight_decay": decay} for group, decay in decays if group]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)  # step() sets it


def _settings(stage: StageSection, num_micro: int, num_parameters: int) -> dict[str, Any]:
    bucket = max(1, min(num_parameters, _LARGEST_BUCKET))
    zero: dict[str, Any] = {"stage": stage.zero_stage}
    if stage.zero_stage:
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    return {
        "train_micro_batch_size_per_gpu": 1,  # nominal: ours vary, and losses are divided by row counts
        "gradient_accumulation_steps": num_micro,
        "gradient_clipping": stage.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": stage.precision == "bf16"},
        "steps_per_print": None,
    }
