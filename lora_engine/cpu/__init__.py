"""The C++ kernels of lora_engine._C, called with tensors.

One module for each operation, with the same functions as `lora_engine.kernels` has for Triton. The
callers in `lora_engine.ops` have checked shapes and dtypes; results are written into tensors that
they made. Rows may be any stride apart, columns are one apart.
"""
