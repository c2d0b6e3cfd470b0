"""What a dump will do, decided before it starts: the plan, a plan that is cached, retries."""
