"""Divergences, the fused head, relation, preference and router losses: tensors to tensors. Uses no other room."""
