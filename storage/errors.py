"""The exceptions that the command line turns into one clear message and an exit code."""

from __future__ import annotations


class StillhouseError(Exception):
    """A failure with one message for a person; the command line exits 1."""


class ConfigError(StillhouseError):
    """The user's mistake in a configuration or a command; the command line exits 2."""


class WriteError(StillhouseError):
    """A file that cannot be written: a full disk, a folder without permission. What was whole before still is."""


class CacheError(StillhouseError):
    """A cache that is missing, unfinished, or asked for what it does not hold."""


class NoCacheError(CacheError, ConfigError):
    """A place that was named as a cache's and has none: the user's mistake."""


class MissingFamilyError(CacheError, ConfigError):
    """A cache that was asked for a family, or what came with one, that it does not hold: the user's mistake."""


class CorruptPartError(CacheError):
    """A file of a cache whose bytes are not what was committed, or not what FORMAT.md allows."""


class IdentityError(CacheError, ConfigError):
    """A cache made by another teacher, tokenizer, template, preprocessing, plan or selection than was asked for."""
