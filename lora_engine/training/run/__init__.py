"""A run's folder: what is in it, who wrote it, and what it is good for later."""
