"""The CUDA C++ kernels of lora_engine._C, called with tensors.

One module for each operation, with the functions that `lora_engine.backends.cpu` and
`lora_engine.backends.triton` have. The callers in `lora_engine.ops` have checked shapes and
dtypes; results are written into tensors that they made. Kernels run on the current stream of the
tensors' device, and nothing here waits for them.
"""
