"""Turns samples into token ids and pixels: chat template, image tokens, processor, truncation. Uses data."""
