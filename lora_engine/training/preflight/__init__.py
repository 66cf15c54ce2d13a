"""Whether a model would learn anything: one batch is tried before a run."""
