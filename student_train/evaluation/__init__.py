"""Judging a student: generated answers, closeness to the teacher, single questions. Uses training's data."""
