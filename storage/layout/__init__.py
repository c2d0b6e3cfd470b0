"""The files and documents of a cache: segments, parts, commits, manifests. Uses backends and records."""
