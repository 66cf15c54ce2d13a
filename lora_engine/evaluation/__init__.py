"""What a run achieved: samples of the model's writing, and the report."""
