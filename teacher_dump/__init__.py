"""Turns samples into signals: prompts, the teacher, its output head, Ray jobs.

The entry point is `python -m teacher_dump`. Nothing is imported here: that command runs this file before __main__.py
takes the current folder, where a user's own storage.py may lie, off the search path.
"""
