"""What PEFT's layers are, and what they are doing at the moment."""
