"""Trains students from a cache: loader, losses, models, stages, and the torchrun entry main.py."""
