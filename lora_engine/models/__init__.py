"""What knows about transformers and PEFT modules: load, attach, detach."""
