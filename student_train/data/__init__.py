"""Turns cached samples into batches: filters, mixtures, order, images, collation. Uses the losses' types."""
