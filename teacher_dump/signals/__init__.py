"""Computes stored signals from hidden states: head, selection, draws, relations, vision check. Uses teachers."""
