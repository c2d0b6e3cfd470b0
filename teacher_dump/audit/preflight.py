"""Checks a teacher before it is loaded, and before it needs a GPU."""

from __future__ import annotations

from storage.identity import NO_TEACHER
from storage.processes import torchvision_shim
from teacher_dump.config import TeacherSection
from teacher_dump.planning.dump_plan import DumpPlan
from teacher_dump.teachers.architectures import check_backend
from teacher_dump.teachers.hf_checkpoint import read_json


def check_teacher(planned: DumpPlan, section: TeacherSection) -> str:
    """Returns a line about the teacher: vocabulary, output head, image token. Loads no weights.

    Raises StillhouseError for an unsupported output head (see find_head); ConfigError for a setting that vLLM does
    not have.
    """
    facts = planned.facts
    sees = f"images as {facts.image_token_id}" if facts.image_token_id >= 0 else "no images"
    if planned.identity.teacher_fingerprint == NO_TEACHER:
        return f"teacher: {facts.vocab_size:,} tokens, {sees}; not asked"
    from teacher_dump.signals.lm_head import find_head

    if section.backend == "vllm" and section.settings:  # importing vLLM takes seconds
        torchvision_shim.import_torch_companions()
        from teacher_dump.teachers.vllm_teacher import check_settings

        check_settings(section.settings)
    head = find_head(planned.checkpoint, vocab_size=facts.vocab_size)
    return f"teacher: {facts.vocab_size:,} tokens, head {head.weight}, {sees}"


def list_teacher_warnings(planned: DumpPlan, section: TeacherSection) -> list[str]:
    """Returns a line for an architecture that is untested in the section's backend. ConfigError: a refused one."""
    if planned.identity.teacher_fingerprint == NO_TEACHER:
        return []
    warning = check_backend(read_json(planned.checkpoint / "config.json"), section.backend)
    return [] if warning is None else [warning]
