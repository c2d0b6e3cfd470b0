"""Writing a cache, part by part, until it is sealed. Uses layout and encoding."""

from storage.writer.cache_writer import CacheWriter as CacheWriter
