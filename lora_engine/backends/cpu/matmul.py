"""Products of large matrices on a CPU's matrix unit: see csrc/cpu/matmul.cpp."""

from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.structs import MatmulArgs


def matmul(
    a: Tensor,  # [m, k]
    b: Tensor,  # [k, n], of adjacent columns, or the transpose of a matrix of such
    c: Tensor,  # [m, n]
    addend: Tensor | None = None,  # [n] or [m, n]; may be c
) -> None:
    """Writes c = a b + addend, rounded once. All are of one dtype."""
    (m, k), n = a.shape, b.shape[1]
    transposed = b.stride(1) != 1
    kernels().matmul(
        dtype_code(a.dtype),
        MatmulArgs(
            a=a.data_ptr(),
            b=b.data_ptr(),
            addend=pointer(addend),
            c=c.data_ptr(),
            m=m,
            n=n,
            k=k,
            a_stride=a.stride(0),
            b_stride=b.stride(1 if transposed else 0),
            addend_stride=0 if addend is None or addend.dim() == 1 else addend.stride(0),
            c_stride=c.stride(0),
            b_transposed=transposed,
        ),
    )
