"""AdamW over flat parameters, and its learning rate."""
