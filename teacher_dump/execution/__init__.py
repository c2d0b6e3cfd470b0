"""A dump from plan to commits: set-up, driver, generated answers, retries. Uses planning, workers and ray_jobs."""
