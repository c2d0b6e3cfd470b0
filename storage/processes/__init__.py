"""Starts and ends processes; handles signals, standard streams, long waits, imports that fail. Uses the errors only."""
