"""Text from a model: batched decoding, sampling, what a prompt's continuations share."""
