"""Training of one stage: data, objective, loop, engine, state, result, journal. Uses data, models and losses."""
