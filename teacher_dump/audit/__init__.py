"""Scores cached samples again and compares them with the cache. Uses estimates and execution."""
