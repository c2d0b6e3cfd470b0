"""The cache: format, codecs, parts, commits, reader, verification. FORMAT.md is its specification."""
