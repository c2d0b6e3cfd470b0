"""DeepSpeed behind a small surface, and its only importer: processes, gradients, optimizer, gathered weights.

On a CPU nothing is compiled. DeepSpeed would build a shared-memory collective with g++ (30 s, once a
machine), which serves its inference kernels alone; gloo does all of training's collectives. It would also
load torch.compile (3 s, every start) for Muon's kernels, to learn that AdamW is not Muon.
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
from student_train.models.expert_parallel import autoep_settings, standard_names
from student_train.models.parameter_groups import ParameterGroup

_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"
_LARGEST_BUCKET = 200_000_000  # elements of gradients that are reduced at once
_RESTART = "mend the disk and try again, or give the state up with --restart, which begins the stage anew"
_PATIENCE = timedelta(hours=6)  # for what the first rank does alone, such as composing a student of many gigabytes

T = TypeVar("T")


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


def from_first(process: Process, make: Callable[[], T]) -> T:
    """What `make` returns on the first rank, on every rank; its StillhouseError is raised on each. A collective.

    What ranks decide from files must be decided by one of them: another node may see a shared folder late.
    """
    if process.num_ranks == 1:
        return make()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if process.is_first:
        try:
            outcome[1] = make()
        except StillhouseError as error:
            kind = ConfigError if isinstance(error, ConfigError) else StillhouseError  # which decide exit codes
            failure, outcome[0] = error, kind(str(error))
    with quiet(Path(os.devnull)):
        _join_ranks(process)
        torch.distributed.broadcast_object_list(outcome, src=0, group=_patient_group(), device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if outcome[0] is not None:
        raise outcome[0]
    return outcome[1]


@dataclass(frozen=True)
class Update:
    """What an optimizer step did."""

    grad_norm: float  # of the whole gradient, before it is clipped
    applied: bool = True  # False: fp16 overflowed at this loss scale; weights stay, the scale falls
    loss_scale: float | None = None  # that was used; None but for fp16


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Engine:
    """A module that trains: DeepSpeed's engine, its process group, and what it prints kept in a file."""

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
        """Join the other ranks and shard `module`'s optimizer, of `groups` of its parameters, as stage.zero_stage says.

        `num_micro`: forward passes an optimizer step. DeepSpeed's and gloo's messages go to `log_path`. `decoder`: its
        configuration, needed for stage.expert_parallel, which puts others in the place of the module's sparse layers.
        """
        self.process = process
        self._scales = stage.precision == "fp16"
        self._log_path = log_path
        self._zero_stage = stage.zero_stage
        self._unwrapped = stage.zero_stage == 0 and stage.precision == "fp32"  # DeepSpeed keeps no norm then
        with quiet(log_path):
            self._deepspeed = _import_deepspeed(process)
            _join(process, self._deepspeed)
            num_parameters = sum(p.numel() for group in groups for p in group.parameters)
            settings = _settings(stage, num_micro, num_parameters, pins=process.device.type == "cuda")
            if stage.expert_parallel > 1:
                settings["expert_parallel"] = autoep_settings(decoder, stage.expert_parallel)
            self._engine: Any = self._deepspeed.initialize(
                model=module,
                model_parameters=_described(groups),
                optimizer=_adamw,
                config=settings,
            )[0]
            for state in self._engine.basic_optimizer.state.values():  # a step with no gradient may have made room
                state["step"].zero_()

    def forward(self, *inputs: Any) -> Any:
        """The module's output, in train mode."""
        return self._engine(*inputs)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the module is in eval mode, and no gradients are made."""
        modes = [(module, module.training) for module in self._engine.modules()]
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss that is this rank's share of a sum over ranks and micro-batches."""
        # DeepSpeed averages over ranks (and over micro-batches, unless told not to); ours are sums.
        self._engine.backward(loss * self.process.num_ranks, scale_wrt_gas=False)

    def step(self, lr: float) -> Update | None:
        """Count a micro-batch; after the last one update weights. `lr`: of groups whose factor is 1.

        StillhouseError: fp16 overflows at any loss scale.
        """
        last = self._engine.is_gradient_accumulation_boundary()
        norm = self._unwrapped_norm() if last and self._unwrapped else 0.0
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        scale = float(optimizer.cur_scale) if self._scales else None
        try:
            self._engine.step()
        except Exception as error:
            if type(error) is Exception and "loss scale already at minimum" in str(error):  # DeepSpeed has no class
                raise StillhouseError(
                    "gradients overflow in fp16 at every loss scale, 1 at last; lower stages.NAME.lr, or take bf16"
                ) from error
            raise
        if not last:
            return None
        if self._unwrapped:
            return Update(norm)
        applied = not self._scales or bool(self._engine.was_step_applied())
        return Update(float(self._engine.get_global_grad_norm()) if applied else math.nan, applied, scale)

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
                        weight = _of_all_ranks(weight, group)
                if self.process.is_first:
                    gathered[name] = weight.to("cpu", copy=self._zero_stage == 3)  # which takes its piece back
        if self.process.is_first:
            buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in gathered}
            gathered.update(buffers)
        return standard_names(gathered) if experts else gathered

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
                raise StillhouseError(f"{folder}: cannot be read back: {error}; {_RESTART}") from error
        if found is None:
            raise StillhouseError(f"{folder}: holds no state of DeepSpeed; {_RESTART}")

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.process.num_ranks > 1:
            with Waiting("the other ranks"):
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
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a log on a full disk; the terminal must come back all the same
                stream.flush()
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
        # It says no where the CPU has no instructions for fp16. PyTorch computes there all the same, slowly.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


def _join(process: Process, deepspeed: Any) -> None:
    deepspeed.init_distributed(_join_ranks(process))


def _join_ranks(process: Process) -> str:
    """Make the process group, unless it is there; returns its backend."""
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if process.device.type == "cuda" else "gloo"
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    if not torch.distributed.is_initialized():
        store = None if "MASTER_ADDR" in os.environ else _store_of_one()
        torch.distributed.init_process_group(backend, rank=process.rank, world_size=process.num_ranks, store=store)
        atexit.register(torch.distributed.destroy_process_group)
    return backend


@cache
def _patient_group() -> Any:
    return importlib.import_module("torch.distributed").new_group(backend="gloo", timeout=_PATIENCE)


def _store_of_one() -> Any:
    """What a process group without others meets in: no port is opened."""
    return importlib.import_module("torch.distributed").HashStore()


def _of_all_ranks(piece: Tensor, group: Any) -> Tensor:
    """The pieces of a group's ranks, one after another."""
    pieces = [torch.empty_like(piece) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(pieces, piece.contiguous(), group=group)
    return torch.cat(pieces)


def _described(groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """Groups of parameters as optimizers have them; AutoEP puts what replaces a parameter into its list."""
    return [
        {
            "params": group.parameters, "weight_decay": group.weight_decay,
            "lr_factor": group.lr_factor, "name": str(number),
        }
        for number, group in enumerate(groups)
    ]  # fmt: skip


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's own, fused on GPU and CPU alike: an offloaded step needs no compiler, as DeepSpeed's would.

    Experts that are divided among ranks have groups of their own, for ZeRO shards them over fewer ranks.
    """
    moe = importlib.import_module("deepspeed.moe.utils")
    split = moe.split_params_into_different_moe_groups_for_optimizer(groups)
    return torch.optim.AdamW([group for group in split if group["params"]], lr=0.0, fused=True)  # step() sets it


def _settings(stage: StageSection, num_micro: int, num_parameters: int, *, pins: bool) -> dict[str, Any]:
    bucket = max(1, min(num_parameters, _LARGEST_BUCKET))
    zero: dict[str, Any] = {"stage": stage.zero_stage}
    if stage.zero_stage:
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    for what, name in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        if what in stage.offload:
            zero[name] = {"device": "cpu", "pin_memory": pins}
    # DeepSpeed's default is the model's dtype, and each micro-batch would round the sum of those before it to 8 bits.
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
