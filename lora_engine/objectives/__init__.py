"""What training minimises: one file an objective, each a pure function of log-probabilities."""
