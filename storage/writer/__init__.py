"""Writing a cache, part by part, until it is sealed. Uses layout and encoding."""
