"""Writes a cache part by part and seals it. Uses layout and encoding."""

from storage.writer.cache_writer import CacheWriter as CacheWriter
