"""Every GPU kernel as PTX for two capabilities, by one ragged case of its operation's own tests.

`make test-ptx` runs all of those tests so; here each kernel runs at least once.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

import cuda_ptx
import pytest
import torch
from implementations import CPU, Backend
from lora_groups import Group

from lora_engine import backends, reference
from lora_engine.backends import launchers
from lora_engine.testing import cu_seqlens
from lora_engine.values import Dropout

ROOT = Path(__file__).parents[2]
FLOAT, BFLOAT = torch.float32, torch.bfloat16
GROUP = Group(70, 96, (136, 40), (16, 8))
ATTENTION = {"dtype": BFLOAT, "poisoned": None}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("test_rms_norm", "test_residual_matches_oracle",
     {"dtype": BFLOAT, "poisoned": None, "shape": (3, 63), "offset": 0.0}),
    ("test_layer_norm", "test_matches_oracle",
     {"dtype": BFLOAT, "poisoned": None, "shape": (65, 100)}),
    ("test_glu", "test_matches_oracle",
     {"dtype": BFLOAT, "poisoned": None, "shape": (33, 1000), "activation": "silu"}),
    ("test_rope", "test_matches_oracle",
     {"dtype": BFLOAT, "poisoned": None, "name": "partial_ragged", "interleaved": False}),
    ("test_cross_entropy", "test_matches_oracle",
     {"dtype": BFLOAT, "poisoned": None, "shape": (2, 2049), "options": "all"}),
    ("test_attention", "test_matches_pytorch",
     {**ATTENTION, "name": "ragged", "heads": 6, "kv_heads": 2, "dim": 64}),
    ("test_attention", "test_continued_sequences_are_as_if_written_out",
     {**ATTENTION, "tree": "tree", "window": 25, "rotated": False}),
    ("test_attention_decode", "test_matches_pytorch",
     {"dtype": BFLOAT, "size": "grouped", "window": 66}),
    ("test_adamw", "test_clips_by_a_norm_it_reads_itself", {}),
    ("test_adamw_8bit", "test_clips_by_a_norm_it_reads_itself", {}),
    ("test_blockwise_4bit", "test_codes_at_any_address", {"offset": 1}),
    ("test_lora_kernels", "test_lora_a_fwd",
     {"dtype": BFLOAT, "poisoned": None, "small_tiles": None, "group": GROUP,
      "dropout": Dropout(0.5, 7)}),
    ("test_lora_kernels", "test_lora_linear_fwd",
     {"dtype": BFLOAT, "poisoned": None, "small_tiles": None, "group": GROUP, "with_bias": True}),
    ("test_lora_kernels", "test_gradients_are_those_of_autograd", {"small_tiles": None}),
    ("test_lora_kernels", "test_factors_are_placed_as_torch_would",
     {"dtype": BFLOAT, "scales": (0.1,) * 6, "factors_dtype": FLOAT}),
    ("test_gated", "test_forward",
     {"dtype": BFLOAT, "poisoned": None, "sizes": (65, 48, (4, 5, 16), 0), "activation": "silu"}),
    ("test_gated", "test_backward",
     {"dtype": BFLOAT, "poisoned": None, "sizes": (65, 48, (4, 5, 16), 0), "activation": "silu"}),
]  # fmt: skip

CUDA_CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("test_attention", "test_continued_sequences_are_as_if_written_out",
     {**ATTENTION, "tree": "one_prefix", "window": 25, "rotated": False}),
    ("test_adamw", "test_clips_by_a_norm_it_reads_itself", {}),
    ("test_adamw_8bit", "test_clips_by_a_norm_it_reads_itself", {}),
    ("test_blockwise_4bit", "test_codes_at_any_address", {"offset": 1}),
]  # fmt: skip


def written_kernels() -> set[str]:
    found = set()
    for path in (ROOT / "kernels" / "src").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.add(node.name)
    return found


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the operations' tests on the import path, where pytest finds them too."""
    for folder in ("ops", "ops/lora", "ops/layer"):
        monkeypatch.syspath_prepend(str(ROOT / "tests" / folder))


def run(cases: list[tuple[str, str, dict[str, Any]]], backend: Backend) -> None:
    for module, test, arguments in cases:
        getattr(importlib.import_module(module), test)(backend=backend, **arguments)


@pytest.mark.parametrize("capability", [80, 90])
def test_every_triton_kernel_runs(capability: int, poisoned: None, operations: None) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the Triton kernels are compiled for the GPU in this process")
    import triton_ptx

    triton_ptx.executed.clear()
    with triton_ptx.executed_ptx(capability):
        run(CASES, Backend("triton", CPU, capability=capability))
    assert {name for _, name in triton_ptx.executed} == written_kernels()


def run_attention_for_hopper() -> None:
    """Kernels that no implementation of an operation has, but a plan of `attention`."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    bounds, dim = cu_seqlens([70, 3]), 64
    leaves = [torch.randn(73, heads, dim).bfloat16().requires_grad_() for heads in (2, 1, 1)]
    o, d_o = reference.attention(*leaves, bounds), torch.randn(73, 2, dim).bfloat16()
    expected = torch.autograd.grad(o, leaves, d_o)
    q, k, v = (x.detach().flatten(1) for x in leaves)
    scores = torch.einsum("qhd,kd->hqk", leaves[0].float(), k.float()) * dim**-0.5
    seen = torch.block_diag(torch.ones(70, 70), torch.ones(3, 3)).tril().bool()
    lse = scores.detach().masked_fill(~seen, -torch.inf).logsumexp(-1)
    made, sums = torch.empty_like(q), torch.empty_like(lse)
    launchers.attention_by_plan("hopper").attention_fwd(
        q, k, v, bounds, None, None, made, sums,
        head_dim=dim, scale=dim**-0.5, causal=True, window=0,
    )  # fmt: skip
    assert (made - o.detach().flatten(1)).abs().max() < 2e-2
    assert (sums - lse).abs().max() < 1e-3
    found = [torch.empty_like(x) for x in (q, k)]
    dv = torch.empty(73, dim + 1, dtype=v.dtype)[:, :-1]  # rows that vectors cannot be written to
    launchers.attention_by_plan("hopper").attention_bwd(
        d_o.flatten(1), q, k, v, bounds, None, None, o.detach().flatten(1), lse, *found, dv,
        head_dim=dim, scale=dim**-0.5, causal=True, window=0,
    )  # fmt: skip
    for x, wanted in zip((*found, dv), expected, strict=True):
        assert (x.float() - wanted.flatten(1).float()).abs().max() < 2e-2 * wanted.abs().max()


@pytest.mark.parametrize("capability", [80, 90])
def test_every_cuda_kernel_runs(
    capability: int, poisoned: None, operations: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name: of a template one instance at least."""
    written = cuda_ptx.kernel_names(capability)
    cuda_ptx.executed.clear()
    with cuda_ptx.executed_cuda(capability) as kernels:
        monkeypatch.setattr(backends.extension, "cuda_emulation", kernels)
        run(CUDA_CASES, Backend("cuda", CPU, capability=capability))
        if capability == 90:
            run_attention_for_hopper()
    assert {cuda_ptx.plain_name(name) for _, name in cuda_ptx.executed} == written
