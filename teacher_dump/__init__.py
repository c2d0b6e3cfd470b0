"""Turns samples into signals: prompts, the teacher, its output head, Ray jobs.

The entry point is `python -m teacher_dump`.
"""

from teacher_dump.torchvision_shim import install as _install_torchvision_hook

_install_torchvision_hook()
