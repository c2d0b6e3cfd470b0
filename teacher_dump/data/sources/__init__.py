"""Readers of files and data sets: each yields rows with their place in the file."""
