"""What a dump will do, decided before it starts, and what a cache there has decided already. Uses teachers."""
