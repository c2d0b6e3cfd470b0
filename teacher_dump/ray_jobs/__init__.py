"""Ray jobs: an actor pool for the parts of a plan, a teacher for one call, commands as tasks.

Only this package imports ray. It works with a Ray that this process starts, with a running cluster (`RAY_ADDRESS`,
`dump.ray_address`), and inside a submitted job.
"""

from teacher_dump.ray_jobs.cluster import count_engine_gpus
from teacher_dump.ray_jobs.commands import Command, CommandResult, run_commands
from teacher_dump.ray_jobs.metrics import DumpMetrics
from teacher_dump.ray_jobs.part_pool import PartPool, score_parts
from teacher_dump.ray_jobs.teacher_actor import call_with_teacher

__all__ = [
    "Command",
    "CommandResult",
    "DumpMetrics",
    "PartPool",
    "call_with_teacher",
    "count_engine_gpus",
    "run_commands",
    "score_parts",
]
