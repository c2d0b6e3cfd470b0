"""Executes a dump plan: setup, driver, generated answers, retries. Uses planning, workers and ray_jobs."""
