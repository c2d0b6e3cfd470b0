"""Where an engine's processes go: the GPUs of one node given to its actor, or a placement group over nodes.

vLLM runs the GPUs of one node from the actor's own process ("mp", its choice where no placement group is current).
With `teacher.settings.distributed_executor_backend: ray` its workers are Ray actors in the placement group that the
actor itself lies in, so a teacher may be larger than a node. Source: vLLM's ParallelConfig and
docs/serving/parallelism_scaling; ray.data.llm places its engines in the same way. There the actor, which holds the
output head, shares the first GPU with the engine's first rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from teacher_dump.ray_jobs.cluster import Resources, gpus_of_engine, gpus_or_default

_HEAD_SHARE = 0.1  # of a GPU, as Ray counts them; vLLM's ranks ask for the rest (VLLM_RAY_PER_WORKER_GPUS)


class Placement:
    """What each actor asks Ray for. Made while there is a connection; the groups are removed by who made it."""

    def __init__(self, resources: Resources, num_bundles: int) -> None:
        self.resources = resources  # of an actor and its engine together
        self._num_bundles = num_bundles  # of a group; 0: no group
        self._groups: list[PlacementGroup] = []

    @staticmethod
    def of(settings: Mapping[str, Any], *, num_cpus: float, num_gpus: float | None) -> Placement:
        """By an engine's settings. num_gpus None: one for each of its ranks, where Ray has GPUs."""
        num_ranks = gpus_of_engine(settings)
        gpus = gpus_or_default(num_gpus, num_ranks)
        by_ray = settings.get("distributed_executor_backend") == "ray" and gpus > 0
        return Placement(Resources(num_cpus, gpus), num_ranks if by_ray else 0)

    def actor_options(self) -> dict[str, Any]:
        """What Ray is told of every actor."""
        if not self._num_bundles:
            return {"num_cpus": self.resources.num_cpus, "num_gpus": self.resources.num_gpus}
        environment = {"VLLM_RAY_PER_WORKER_GPUS": str(1 - _HEAD_SHARE)}
        return {
            "num_cpus": self.resources.num_cpus,
            "num_gpus": _HEAD_SHARE,
            "runtime_env": {"env_vars": environment},
        }

    def group_options(self) -> dict[str, Any]:
        """A new group for a new actor, its first bundle with room for the actor; nothing where none is needed."""
        if not self._num_bundles:
            return {}
        bundle = {"CPU": 1.0, "GPU": 1.0}  # a rank
        first = {**bundle, "CPU": 1.0 + self.resources.num_cpus}
        group = ray.util.placement_group([first] + [bundle] * (self._num_bundles - 1), strategy="PACK")
        self._groups.append(group)
        strategy = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
        return {"scheduling_strategy": strategy}

    @property
    def makes_groups(self) -> bool:
        return self._num_bundles > 0

    def remove_groups(self) -> None:
        """Give back what the groups hold; their actors end with them."""
        while self._groups:
            ray.util.remove_placement_group(self._groups.pop())
