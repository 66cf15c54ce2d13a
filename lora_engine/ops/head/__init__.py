"""Losses of a linear head that never holds the logits of all rows."""
