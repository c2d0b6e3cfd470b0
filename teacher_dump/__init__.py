"""Turns samples into signals: prompts, the teacher, its output head, Ray jobs.

The entry point is `python -m teacher_dump`.
"""

from storage.processes import torchvision_shim

torchvision_shim.install()
