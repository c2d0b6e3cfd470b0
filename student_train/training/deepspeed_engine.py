"""Wraps DeepSpeed, which only this file imports: processes, gradients, optimizer, gathered weights.

On a CPU nothing is compiled. DeepSpeed would build a shared-memory collective with g++ (30 s, once a
machine), which only its inference kernels use; gloo does all of training's collectives. It would also
load torch.compile (3 s, every start) for Muon's kernels, which AdamW does not use.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import math
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from storage.errors import ConfigError, StillhouseError
from storage.processes.waiting import Waiting
from student_train.config import StageSection
from student_train.models.expert_parallel import make_autoep_settings, to_standard_names
from student_train.models.parameter_groups import ParameterGroup

_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"
_LARGEST_BUCKET = 200_000_000  # gradient elements that are reduced at once
_RESTART = "repair the disk and try again, or discard the state with --restart, which starts the stage again"
_PATIENCE = timedelta(hours=6)  # for work of the first rank alone, such as composing a student of many gigabytes

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """Rank, number of ranks and device of this process."""

    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def detect_process() -> Process:
    """Read rank and device from torchrun's environment; without it the only rank. Uses a GPU if there is one."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    return Process(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)


def run_on_first_rank(process: Process, make: Callable[[], T]) -> T:
    """Call `make` on the first rank; return its result, or raise its StillhouseError, on every rank. A collective.

    Decisions that depend on files must be made by one rank: another node may see a shared folder late.
    """
    if process.num_ranks == 1:
        return make()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if process.is_first:
        try:
            outcome[1] = make()
        except StillhouseError as error:
            kind = ConfigError if isinstance(error, ConfigError) else StillhouseError  # these two decide exit codes
            failure, outcome[0] = error, kind(str(error))
    with redirect_output(Path(os.devnull)):
        _init_process_group(process)
        torch.distributed.broadcast_object_list(outcome, src=0, group=_make_patient_group(), device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if outcome[0] is not None:
        raise outcome[0]
    return outcome[1]


@dataclass(frozen=True)
class StepUpdate:
    """The outcome of an optimizer step."""

    grad_norm: float  # of the whole gradient, before clipping
    applied: bool = True  # False: fp16 overflowed; the weights are unchanged and the loss scale is lowered
    loss_scale: float | None = None  # used in this step; fp16 only


def measure_peak_memory(device: torch.device) -> int:
    """Return this process's peak memory: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Engine:
    """Trains a module: DeepSpeed's engine and process group, with their output redirected to a file."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        stage: StageSection,
        process: Process,
        *,
        num_micro: int,
        log_path: Path,
        decoder: Any = None,
    ) -> None:
        """Join the other ranks and shard the optimizer of `module`'s parameter `groups` by stage.zero_stage.

        `num_micro`: forward passes an optimizer step. DeepSpeed's and gloo's output goes to `log_path`. `decoder`: the
        decoder's configuration; stage.expert_parallel needs it to replace the module's sparse layers.
        """
        self.process = process
        self._scales = stage.precision == "fp16"
        self._log_path = log_path
        self._zero_stage = stage.zero_stage
        self._unwrapped = stage.zero_stage == 0 and stage.precision == "fp32"  # DeepSpeed keeps no gradient norm then
        with redirect_output(log_path):
            self._deepspeed = import_deepspeed(process)
            _init_deepspeed(process, self._deepspeed)
            num_parameters = sum(p.numel() for group in groups for p in group.parameters)
            settings = _make_config(stage, num_micro, num_parameters, pins=process.device.type == "cuda")
            if stage.expert_parallel > 1:
                settings["expert_parallel"] = make_autoep_settings(decoder, stage.expert_parallel)
            self._engine: Any = self._deepspeed.initialize(
                model=module,
                model_parameters=_describe_groups(groups),
                optimizer=_make_adamw,
                config=settings,
            )[0]
            for state in self._engine.basic_optimizer.state.values():  # DeepSpeed may have run a step without gradients
                state["step"].zero_()

    def forward(self, *inputs: Any) -> Any:
        """Return the module's output, in train mode."""
        return self._engine(*inputs)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the module into eval mode without gradients, within the context."""
        modes = [(module, module.training) for module in self._engine.modules()]
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's share of a loss that is a sum over ranks and micro-batches."""
        # DeepSpeed averages over ranks (and over micro-batches, unless disabled); our losses are sums.
        self._engine.backward(loss * self.process.num_ranks, scale_wrt_gas=False)

    def step(self, lr: float) -> StepUpdate | None:
        """Count a micro-batch; after the last one, update weights and return the outcome.

        `lr`: the learning rate of groups with factor 1. StillhouseError: fp16 overflows at any loss scale.
        """
        last = self._engine.is_gradient_accumulation_boundary()
        norm = self._compute_unwrapped_norm() if last and self._unwrapped else 0.0
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        scale = float(optimizer.cur_scale) if self._scales else None
        try:
            self._engine.step()
        except Exception as error:
            if type(error) is Exception and "loss scale already at minimum" in str(error):  # DeepSpeed has no class
                raise StillhouseError(
                    "gradients overflow in fp16 at every loss scale down to 1; lower stages.NAME.lr, or take bf16"
                ) from error
            raise
        if not last:
            return None
        if self._unwrapped:
            return StepUpdate(norm)
        applied = not self._scales or bool(self._engine.was_step_applied())
        return StepUpdate(float(self._engine.get_global_grad_norm()) if applied else math.nan, applied, scale)

    def _compute_unwrapped_norm(self) -> float:
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum each value over ranks. A collective."""
        return self._reduce(values, torch.distributed.ReduceOp.SUM)

    def max_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the maximum of each value over ranks. A collective."""
        return self._reduce(values, torch.distributed.ReduceOp.MAX)

    def _reduce(self, values: Mapping[str, float], operation: Any) -> dict[str, float]:
        if self.process.num_ranks == 1:
            return dict(values)
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.process.device)
        torch.distributed.all_reduce(packed, op=operation)
        return dict(zip(values, packed.tolist(), strict=True))

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Gather the whole weights of a part of the module on the first rank; empty on the others. A collective."""
        experts = {
            f"{path}.experts.": layer.ep_group
            for path, layer in model.named_modules()
            if getattr(layer, "_is_autoep_layer", False)
        }
        if self._zero_stage < 3 and not experts:
            return dict(model.state_dict()) if self.process.is_first else {}
        gathered: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            with self._deepspeed.zero.GatheredParameters([parameter]):
                weight = parameter.detach()
                for prefix, group in experts.items():
                    if name.startswith(prefix):
                        weight = _gather_pieces(weight, group)
                if self.process.is_first:
                    gathered[name] = weight.to("cpu", copy=self._zero_stage == 3)  # ZeRO-3 frees the gathered weight
        if self.process.is_first:
            buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in gathered}
            gathered.update(buffers)
        return to_standard_names(gathered) if experts else gathered

    def save_state(self, folder: Path) -> None:
        """Save trained weights and optimizer in DeepSpeed's files, to resume from. A collective."""
        with redirect_output(self._log_path):
            self._engine.save_checkpoint(
                str(folder.parent), folder.name, save_latest=False, exclude_frozen_parameters=True
            )

    def load_state(self, folder: Path) -> None:
        """Restore a state that `save_state` saved with the same number of ranks. StillhouseError: broken files."""
        with redirect_output(self._log_path):
            try:
                found, _ = self._engine.load_checkpoint(
                    str(folder.parent), folder.name, load_module_strict=False, load_lr_scheduler_states=False
                )
            except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
                raise StillhouseError(f"{folder}: cannot be read back: {error}; {_RESTART}") from error
        if found is None:
            raise StillhouseError(f"{folder}: holds no state of DeepSpeed; {_RESTART}")

    def barrier(self) -> None:
        """Wait until all ranks arrive here."""
        if self.process.num_ranks > 1:
            with Waiting("the other ranks"):
                torch.distributed.barrier()

    def close(self) -> None:
        """Release the module. The process group stays, so that this process may train another stage."""
        self._engine.destroy()


@contextlib.contextmanager
def redirect_output(log_path: Path) -> Iterator[None]:
    """Append all output of Python and native code to a file, within the context."""
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
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a log on a full disk; the terminal must be restored nevertheless
                stream.flush()
        for descriptor, number in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def import_deepspeed(process: Process) -> Any:
    """Return the module, without its warnings and without what only GPUs need; takes seconds the first time."""
    if process.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's own calls
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = importlib.import_module("deepspeed")
        with importlib.import_module("torch._dynamo").config.patch(disable=True):
            importlib.import_module(_MUON)
    if process.device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # the cached result of a probe that found nothing to build
        # DeepSpeed refuses fp16 on CPUs without fp16 instructions, but PyTorch computes it, slowly.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


def _init_deepspeed(process: Process, deepspeed: Any) -> None:
    deepspeed.init_distributed(_init_process_group(process))


def _init_process_group(process: Process) -> str:
    """Create the process group unless it exists; return its backend."""
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if process.device.type == "cuda" else "gloo"
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    if not torch.distributed.is_initialized():
        store = None if "MASTER_ADDR" in os.environ else _make_local_store()
        torch.distributed.init_process_group(backend, rank=process.rank, world_size=process.num_ranks, store=store)
        atexit.register(torch.distributed.destroy_process_group)
    return backend


@cache
def _make_patient_group() -> Any:
    return importlib.import_module("torch.distributed").new_group(backend="gloo", timeout=_PATIENCE)


def _make_local_store() -> Any:
    """Return a store for a process group of one rank, which opens no port."""
    return importlib.import_module("torch.distributed").HashStore()


def _gather_pieces(piece: Tensor, group: Any) -> Tensor:
    """Concatenate the pieces of a group's ranks. A collective of the group."""
    pieces = [torch.empty_like(piece) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(pieces, piece.contiguous(), group=group)
    return torch.cat(pieces)


def _describe_groups(groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """Convert parameter groups to an optimizer's dicts, in whose lists AutoEP replaces parameters."""
    return [
        {
            "params": group.parameters, "weight_decay": group.weight_decay,
            "lr_factor": group.lr_factor, "name": str(number),
        }
        for number, group in enumerate(groups)
    ]  # fmt: skip


def _make_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Create torch's fused AdamW, for GPU and CPU: unlike DeepSpeed's, an offloaded step needs no compiler.

    Experts that are sharded among ranks get groups of their own, since ZeRO shards them over fewer ranks.
    """
    moe = importlib.import_module("deepspeed.moe.utils")
    split = moe.split_params_into_different_moe_groups_for_optimizer(groups)
    return torch.optim.AdamW([group for group in split if group["params"]], lr=0.0, fused=True)  # step() sets it


def _make_config(stage: StageSection, num_micro: int, num_parameters: int, *, pins: bool) -> dict[str, Any]:
    bucket = max(1, min(num_parameters, _LARGEST_BUCKET))
    zero: dict[str, Any] = {"stage": stage.zero_stage}
    if stage.zero_stage:
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    for what, name in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        if what in stage.offload:
            zero[name] = {"device": "cpu", "pin_memory": pins}
    # DeepSpeed's default is the model's dtype, where each micro-batch would round the accumulated sum to 8 bits.
    data_types = {"grad_accum_dtype": "fp32"} if stage.zero_stage and stage.precision == "bf16" else {}
    return {
        "data_types": data_types,
        "train_micro_batch_size_per_gpu": 1,  # nominal: ours vary, and losses are divided by row counts
        "gradient_accumulation_steps": num_micro,
        "gradient_clipping": stage.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": stage.precision == "bf16"},
        "fp16": {"enabled": stage.precision == "fp16"},  # the loss scale is dynamic, from 2^16
        "steps_per_print": None,
    }
