"""What a dump will cost and lose, from a slice of it: bytes, hours, the fidelity budget. Uses execution."""
