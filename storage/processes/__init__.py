"""Starts and ends processes; handles signals, standard streams and long waits. Uses the errors only."""
