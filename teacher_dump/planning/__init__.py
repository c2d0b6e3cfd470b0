"""Plans a dump before it starts, and recovers the plan of an existing cache. Uses teachers."""
