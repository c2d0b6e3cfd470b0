"""The student model: loading, composing, sparse upcycling, LoRA, experts, checkpoints. Uses data."""
