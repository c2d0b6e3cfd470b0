"""From hidden states to what a cache stores: head, selection, draws, relations, checks of sight. Uses teachers."""
