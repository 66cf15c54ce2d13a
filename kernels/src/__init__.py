"""Triton kernels: lora_engine.backends.triton.

One module for each operation, with the functions that `lora_engine.backends.cpu` has for the C++
kernels. The callers in `lora_engine.ops` have checked shapes and dtypes; results are written into
tensors that they made. Rows may be any stride apart, columns are one apart. Derivations and what
was tried are in kernels/notes.
"""
