"""The full scan of a cache: checksums, bounds, counts. Uses the reader, layout and encoding."""
