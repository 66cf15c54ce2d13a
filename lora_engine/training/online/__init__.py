"""Training on what the model writes itself: rollouts, rewards, and the batches made of them."""
