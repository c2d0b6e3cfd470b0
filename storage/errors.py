"""Exceptions that the command line reports as one message, with the exit code that each stands for."""

from __future__ import annotations


class StillhouseError(Exception):
    """A failure that one message explains; the command line exits 1."""


class ConfigError(StillhouseError):
    """A user's mistake in the configuration or the command; the command line exits 2."""


class WriteError(StillhouseError):
    """A file cannot be written, e.g. the disk is full. Files that were complete before are unchanged."""


class CacheError(StillhouseError):
    """A cache is missing or unfinished, or does not hold the requested data."""


class NoCacheError(CacheError, ConfigError):
    """The given path holds no cache (a user's mistake: exit code 2)."""


class MissingFamilyError(CacheError, ConfigError):
    """The cache lacks a requested family, or data that belongs to it (a user's mistake: exit code 2)."""


class CorruptPartError(CacheError):
    """A cache file differs from what was committed, or violates FORMAT.md."""


class IdentityError(CacheError, ConfigError):
    """The cache's identity (teacher, tokenizer, template, plan, selection, …) differs from the run's."""
