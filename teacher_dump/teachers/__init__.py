"""The teacher model: vLLM, transformers, its checkpoint and fingerprint. Uses prompts."""
