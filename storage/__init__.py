"""The cache: file format, encoding, writer, reader and verification. FORMAT.md specifies the format."""
