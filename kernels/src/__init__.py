"""Triton kernels: lora_engine.kernels.

One module for each operation, with the same functions as `lora_engine.cpu` has for the C++ kernels.
The callers in `lora_engine.ops` have checked shapes and dtypes; results are written into tensors
that they made. Rows may be any stride apart, columns are one apart. Derivations and what was tried
are in kernels/README.md.
"""
