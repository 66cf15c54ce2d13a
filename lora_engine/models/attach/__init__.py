"""Attach kernels to a model of transformers, and take them off again."""
