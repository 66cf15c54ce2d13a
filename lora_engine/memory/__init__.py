"""How much memory training takes, and what takes less of it."""
