"""Doing it: workers, the driver that shares parts out, generated answers, progress, logs. Uses signals and planning."""
