"""Foreign checkpoints to checkpoints of transformers, which teachers and students load."""
