"""Ray: an actor pool over the parts of a plan, a teacher for one call, commands as tasks. Nobody else imports ray.

Works with a Ray that this process starts, with a running cluster (`RAY_ADDRESS`, `dump.ray_address`), and
inside a submitted job.
"""

from teacher_dump.ray_jobs.cluster import gpus_of_engine
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
    "gpus_of_engine",
    "run_commands",
    "score_parts",
]
