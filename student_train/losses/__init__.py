"""Divergences, the fused head, relation, preference and router losses. Pure: tensors in, tensors out."""
