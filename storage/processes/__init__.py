"""Processes: starting and ending them, signals, standard streams, long waits. Uses the errors alone."""
