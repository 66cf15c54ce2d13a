"""Models whose frozen linears several processes share."""
