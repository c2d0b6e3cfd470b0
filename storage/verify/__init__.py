"""The full scan of a cache: checksums, bounds, counts. Uses the reader, layout and encoding."""

from storage.verify.scan_cache import verify as verify
