"""Asking the teacher again and comparing with the cache. Uses estimates and execution."""
