"""From a trained adapter to what other programs run: merged, verified, written in their formats."""
