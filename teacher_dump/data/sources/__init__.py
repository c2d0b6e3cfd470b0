"""Readers of files and data sets: each gives rows with the place that they came from."""
