"""For all tests: how hypothesis draws, checks of shapes, the order of files, and one running Ray."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from jaxtyping import install_import_hook

from tests.hypothesis_profiles import register_profiles
from tests.teacher_dump.ray_head import RayHead, running_ray_head

SHAPED_MODULES = (  # whose functions' shapes are checked at each call
    "student_train.data.collate",
    "student_train.losses.fused_linear",
    "student_train.losses.head_products",
    "student_train.losses.load_balancing",
    "student_train.losses.preference",
    "student_train.losses.relation",
    "student_train.losses.sparse_divergence",
    "student_train.models.student",
    "student_train.training.objective",
    "teacher_dump.signals.lm_head",
    "teacher_dump.signals.sparsify",
    "teacher_dump.signals.tail_sampling",
    "teacher_dump.signals.teacher_noise",
    "teacher_dump.teachers.teacher",
)
LONGEST_FILES = (  # come first, so that two processes that share the files end at about the same time
    "test_part_pool.py",
    "test_resume.py",
    "test_expert_parallel.py",
    "test_run.py",
    "test_architectures.py",
    "test_end_to_end.py",
    "test_answer_generation.py",
    "test_vllm_teacher.py",
)

_NO_MODELS = tempfile.TemporaryDirectory(prefix="stillhouse-hub-")
os.environ["HF_HUB_CACHE"] = _NO_MODELS.name  # no test depends on what this machine's owner has downloaded

register_profiles()
install_import_hook(SHAPED_MODULES, "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """A Ray that is running already: a command that is told of it starts some ten seconds sooner."""
    with running_ray_head() as head:
        yield head
