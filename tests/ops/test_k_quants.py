"""GGUF's K types: right by what they lose, against llama.cpp's own choice and the reference."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from implementations import Backend
from torch import Tensor

from lora_engine import ops

gguf = pytest.importorskip("gguf")

OPERATION = "k_quants"
pytestmark = pytest.mark.reference


def made(backend: Backend, w: Tensor, kind: str) -> np.ndarray:
    return ops.quantize_k(w.to(backend.device), kind, impl=backend.impl).cpu().numpy()


def llama_cpp_quantizes(w: np.ndarray, kind: str) -> np.ndarray:
    """llama.cpp's own choice of codes."""
    xllamacpp = pytest.importorskip("xllamacpp")
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    if not hasattr(library, "ggml_quantize_chunk"):
        pytest.skip("this build of llama.cpp shows no quantiser")
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    sizes = [ctypes.c_int64] * 3
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *sizes, ctypes.c_void_p]
    qtype = gguf.GGMLQuantizationType[kind]
    codes = np.empty(gguf.quant_shape_to_byte_shape(w.shape, qtype), np.uint8)
    quantize(int(qtype), w.ctypes.data, codes.ctypes.data, 0, *w.shape, None)
    return codes


def lost(codes: np.ndarray, kind: str, w: np.ndarray) -> float:
    values = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[kind])
    return float(((values.astype(np.float64) - w) ** 2).mean())


DISTRIBUTIONS: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "normal": lambda n: torch.randn(n),
    "uniform": lambda n: torch.rand(n) - 0.5,
    "heavy tails": lambda n: torch.distributions.StudentT(4.0).sample(n),
    "not around zero": lambda n: torch.randn(n) + 3,
    "all positive": lambda n: torch.rand(n) + 0.1,
    "outliers": lambda n: torch.randn(n) * (1 + 50 * (torch.rand(n) > 0.995)),
    "a wave": lambda n: 0.1 + 2 * torch.cos(torch.arange(n[0] * n[1]).float()).view(n),
}


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("values", DISTRIBUTIONS)
def test_they_lose_less_than_llama_cpp_s_own(backend: Backend, kind: str, values: str) -> None:
    torch.manual_seed(0)
    w = DISTRIBUTIONS[values]((16, 1024)).contiguous()
    ours = lost(made(backend, w, kind), kind, w.numpy())
    theirs = lost(llama_cpp_quantizes(w.numpy(), kind), kind, w.numpy())
    assert ours < theirs


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_odd_blocks(backend: Backend, kind: str) -> None:
    grid = torch.zeros(1, 256)
    np.testing.assert_array_equal(decoded(made(backend, grid, kind), kind), 0)
    one = torch.zeros(1, 256)
    one[0, 77] = -3.0
    assert np.abs(decoded(made(backend, one, kind), kind) - one.numpy()).max() < 3e-3
    same = torch.full((1, 256), 0.3)
    assert np.abs(decoded(made(backend, same, kind), kind) - 0.3).max() < 6e-4
    small = 1e-5 * torch.randn(4, 256)
    assert np.isfinite(decoded(made(backend, small, kind), kind)).all()


def decoded(codes: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("values", DISTRIBUTIONS)
def test_they_lose_what_the_reference_loses(backend: Backend, kind: str, values: str) -> None:
    """Sums in another order may settle for another of two codes that are as good."""
    torch.manual_seed(1)
    w = DISTRIBUTIONS[values]((16, 512)).contiguous()
    codes, right = made(backend, w, kind), ops.quantize_k(w, kind, impl="reference").numpy()
    assert codes.shape == right.shape and codes.dtype == right.dtype
    assert lost(codes, kind, w.numpy()) == pytest.approx(lost(right, kind, w.numpy()), rel=2e-2)
    assert (codes == right).mean() > 0.9


def test_a_weight_of_any_dtype_is_read_in_float32(backend: Backend, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.randn(4, 600).to(dtype)
    w = wide[:, 40:552]  # rows that do not follow one another
    whole = w.float().contiguous()
    np.testing.assert_array_equal(made(backend, w, "Q6_K"), made(backend, whole, "Q6_K"))


def test_what_does_not_fit_is_refused(backend: Backend) -> None:
    for w in (torch.randn(2, 255), torch.randn(256), torch.ones(2, 256, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"quantize_k: w .* is not \[N, K\] of a float dtype"):
            made(backend, w, "Q4_K")
    with pytest.raises(ValueError, match="kind='Q3_K': expected Q4_K, Q5_K, Q6_K"):
        made(backend, torch.randn(2, 256), "Q3_K")
    assert made(backend, torch.empty(0, 256), "Q4_K").shape == (0, 144)
