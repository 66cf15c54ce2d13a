"""The C++ kernels of lora_engine._C, called with tensors.

One module for each operation, with the functions that `lora_engine.backends.triton` has. The
callers in `lora_engine.ops` have checked shapes and dtypes; results are written into tensors that
they made. Rows may be any stride apart, columns are one apart.
"""
