"""Models and tokenizers from folders, the hub and GGUF files."""
