"""Does a model learn anything? Tried on one batch before a run."""
