"""Estimates of a dump from a slice of it: bytes, hours, the fidelity budget. Uses execution."""
