"""Samples to signals: prompts, the teacher, its output head, Ray jobs. The way in is `python -m teacher_dump`."""
