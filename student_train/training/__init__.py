"""One stage: its data, objective, loop, engine, state, result and journal. Uses data, models and losses."""
