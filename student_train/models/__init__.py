"""The student model: loading, composing, pruning, sparse upcycling, LoRA, experts, checkpoints. Uses data."""
