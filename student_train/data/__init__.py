"""From cached samples to batches: filters, mixtures, order, images, collation. Uses losses' types."""
