"""The fine-tuning loop: configuration, schedule, flat optimiser, checkpoints, held-out loss."""
