"""What a model does: its loss on held-out data, samples of its writing, the origin of a NaN."""
