"""The student: loading, composing, sparse upcycling, LoRA, experts, checkpoints. Uses data."""
