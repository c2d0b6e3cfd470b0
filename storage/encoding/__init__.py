"""Encodes records as bytes and Arrow columns, and decodes them. No I/O; uses records."""
