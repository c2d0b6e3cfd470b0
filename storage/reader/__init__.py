"""Opening, reading and iterating a cache. Uses layout and encoding."""
