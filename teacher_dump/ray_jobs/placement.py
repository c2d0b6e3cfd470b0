"""Places an engine's processes: on the GPUs of its actor's node, or in a placement group over nodes.

vLLM drives the GPUs of one node from the actor's own process ("mp", its choice without a current placement group).
With `teacher.settings.distributed_executor_backend: ray` its workers are Ray actors in the actor's placement group,
so a teacher may be larger than a node. Source: vLLM's ParallelConfig and docs/serving/parallelism_scaling;
ray.data.llm places its engines in the same way. The actor, which holds the output head, then shares the first GPU
with the engine's first rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from teacher_dump.ray_jobs.cluster import Resources, count_engine_gpus, resolve_num_gpus

_HEAD_SHARE = 0.1  # of a GPU, as Ray counts them; vLLM's ranks request the rest (VLLM_RAY_PER_WORKER_GPUS)


class Placement:
    """The resources that each actor requests of Ray. Needs a connection; its maker removes the groups."""

    def __init__(self, resources: Resources, num_bundles: int) -> None:
        self.resources = resources  # of an actor and its engine together
        self._num_bundles = num_bundles  # of a group; 0: no group
        self._groups: list[PlacementGroup] = []

    @staticmethod
    def from_settings(settings: Mapping[str, Any], *, num_cpus: float, num_gpus: float | None) -> Placement:
        """Makes the placement of an engine. num_gpus None: one for each of its ranks, if Ray has GPUs."""
        num_ranks = count_engine_gpus(settings)
        gpus = resolve_num_gpus(num_gpus, num_ranks)
        by_ray = settings.get("distributed_executor_backend") == "ray" and gpus > 0
        return Placement(Resources(num_cpus, gpus), num_ranks if by_ray else 0)

    def actor_options(self) -> dict[str, Any]:
        """Returns Ray's options for every actor."""
        if not self._num_bundles:
            return {"num_cpus": self.resources.num_cpus, "num_gpus": self.resources.num_gpus}
        environment = {"VLLM_RAY_PER_WORKER_GPUS": str(1 - _HEAD_SHARE)}
        return {
            "num_cpus": self.resources.num_cpus,
            "num_gpus": _HEAD_SHARE,
            "runtime_env": {"env_vars": environment},
        }

    def group_options(self) -> dict[str, Any]:
        """Makes a placement group for a new actor, who fits into its first bundle; {} if none is needed."""
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
        """Removes the groups, which ends their actors."""
        while self._groups:
            ray.util.remove_placement_group(self._groups.pop())
