"""The engine check: scores a slice of the samples with the engine and with transformers, and compares them."""
