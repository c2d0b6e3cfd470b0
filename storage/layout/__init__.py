"""Which files a cache has and what its documents say: segments, parts, commits, manifest. Uses backends and records."""
