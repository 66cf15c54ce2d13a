"""Linears with LoRA: the base weight, its adapters, and the product of both."""
