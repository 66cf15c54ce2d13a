"""Faults planted in correct kernels' PTX: each shows as a wrong number or as a fault that says why.

docs/ptx-machine.md has the table.
"""

import mmap
import re
from collections.abc import Callable
from pathlib import Path

import ptx
import pytest
import torch
from ptx.nvcc import compile_cuda
from torch import Tensor

from lora_engine import backends, ops, reference
from lora_engine.backends import launchers
from lora_engine.testing import cu_seqlens

HOPPER = Path(__file__).with_name("hopper_product.cu")
WAIT = r"@done bra finished;\s+bra again;"
WGMMA_WAIT = r"wgmma\.wait_group\.sync\.aligned 0;"
SWIZZLE_128 = r"4611686293305360384"  # in a matrix descriptor, beside the offsets


def swizzle_64(match: re.Match[str]) -> str:
    return str(int(match[0]) + (1 << 62))


# name: what is replaced, by what, and the fault that must name it; None where numbers are wrong.
HOPPER_FAULTS: dict[str, tuple[str, str | Callable[[re.Match[str]], str], str | None]] = {
    "no wait for a tile": (WAIT, "", "more arrivals at an mbarrier|wrong"),
    "a parity that never flips": (
        r"(try_wait\.parity\.shared::cta\.b64 done, \[%r\d+\]), %r\d+",
        r"\1, 0",
        "deadlock|wrong",
    ),
    "fewer bytes expected": (r"(expect_tx\.\S+ _, \[%r\d+\]), %r\d+;", r"\1, 8192;", "deadlock"),
    "a wait of wgmma that allows one more": (
        WGMMA_WAIT,
        "wgmma.wait_group.sync.aligned 1;",
        "a wgmma still in flight",
    ),
    "no wait of wgmma": (WGMMA_WAIT, "", "wgmma"),
    "a wrong swizzle": (SWIZZLE_128, swizzle_64, "wrong"),
    "a stage freed by one warpgroup alone": (
        r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )%r\d+;",
        r"\g<1>1;",
        "wrong|more arrivals|deadlock",
    ),
    "no barrier before the result takes the tiles' place": (r"bar\.sync 1, 256;", "", "wrong"),
    "a barrier for half of its warps": (r"bar\.sync 1, 256;", "bar.sync 1, 128;", "wrong"),
    "a barrier for more threads": (r"bar\.sync 1, 256;", "bar.sync 1, 288;", "deadlock"),
    "no fence before the bulk store": (r"fence\.proxy\.async\.shared::cta;", "", "wrong"),
    "no barrier before the bulk store": (r"bar\.sync %r\d+, 128;", "", "wrong"),
    "a store that nobody waits for": (
        r"cp\.async\.bulk\.wait_group\.read 0;",
        "",
        "before its bulk stores have read",
    ),
}


def outcome(run: Callable[[int], bool], seeds: int) -> str:
    """The first fault of some schedules, "wrong" for wrong numbers, or "right"."""
    for seed in range(seeds):
        try:
            if not run(seed):
                return "wrong"
        except ptx.core().Fault as fault:
            return str(fault)
    return "right"


def hopper(text: str, entry: str, seed: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 448, generator=generator).bfloat16() for n in (128, 64))
    y = torch.full((128, 64), float("nan"))
    maps = [ptx.TensorMap(x, (64, 128), 128), ptx.TensorMap(w, (64, 64), 128)]
    ptx.Kernel(text, entry).launch(
        (1,),
        288,
        [*maps, ptx.TensorMap(y, (64, 64)), 448],
        shared=2 * (128 + 64) * 128 + 1024,
        seed=seed,
        most_steps=10**6,
    )
    return bool((y - x.double() @ w.double().T).abs().max() < 1e-3)


@pytest.mark.parametrize("name", HOPPER_FAULTS)
def test_a_fault_in_a_warp_specialised_kernel(name: str) -> None:
    pattern, replacement, expected = HOPPER_FAULTS[name]
    text = compile_cuda(HOPPER, "90a")
    broken, count = re.subn(pattern, replacement, text)
    assert count, "the fault changes nothing"
    assert outcome(lambda seed: hopper(text, "product_from_shared", seed), 3) == "right"
    found = outcome(lambda seed: hopper(broken, "product_from_shared", seed), 20)
    assert re.search(expected, found), found


def product(capability: int, change: Callable[[str], str], seed: int) -> bool:
    """Y = x W^T + S B^T by the Triton kernel, whose PTX is changed."""
    from triton_ptx import executed_ptx

    torch.manual_seed(0)
    x, w = torch.randn(70, 512 + 16).bfloat16(), torch.randn(136, 512 + 16).bfloat16()
    y = torch.full((70, 136), float("nan"), dtype=torch.bfloat16)
    with executed_ptx(capability, change=change, seed=100 * seed):
        kernels = launchers.lora_linear("triton")
        kernels.lora_linear_fwd(x[:, :512], w[:, :512], x[:, 512:], w[:, 512:], y)
    return error(y, x.double() @ w.double().T) < 1e-2


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def glu(capability: int, change: Callable[[str], str], seed: int) -> bool:
    from triton_ptx import executed_ptx

    torch.manual_seed(0)
    gate, up = torch.randn(33, 1000), torch.randn(33, 1000)
    with executed_ptx(capability, change=change, seed=100 * seed):
        y = ops.glu(gate, up, impl="triton")
    return error(y, reference.glu(gate.double(), up.double())) < 1e-5


def norm(capability: int, change: Callable[[str], str], seed: int) -> bool:
    from triton_ptx import executed_ptx

    torch.manual_seed(0)
    x, weight = torch.randn(5, 4097), torch.randn(4097)
    with executed_ptx(capability, change=change, seed=100 * seed):
        y = ops.rms_norm(x, weight, 1e-5, impl="triton")
    return error(y, reference.rms_norm(x.double(), weight.double(), 1e-5)) < 1e-5


def distant_rows(capability: int, change: Callable[[str], str], seed: int) -> bool:
    """Rows 2 GB apart, in memory of which only they exist."""
    from triton_ptx import executed_ptx

    stride, no_reserve = 2**30 + 8, 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    with mmap.mmap(-1, 2 * (2 * stride + 64), flags=flags) as memory:
        x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, 64), (stride, 1))
        x.copy_(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
        weight = torch.ones(64).bfloat16()
        with executed_ptx(capability, change=change, seed=100 * seed):
            y = ops.rms_norm(x, weight, 1e-5, impl="triton")
        exact = reference.rms_norm(x.double(), weight.double(), 1e-5)
        del x
    return error(y, exact) < 1e-2


TRITON_FAULTS = {
    "a wait of cp.async that allows more": (
        product,
        80,
        r"cp\.async\.wait_group\s+(\d+);",
        lambda match: f"cp.async.wait_group {int(match[1]) + 1};",
    ),
    "no wait of cp.async": (product, 80, r"cp\.async\.wait_group\s+\d+;", ""),
    "no barrier between stages": (product, 80, r"bar\.sync\s+0;", ""),
    "no barrier on Hopper": (product, 90, r"bar\.sync\s+0;", ""),
    "no wait of wgmma": (product, 90, r"wgmma\.wait_group\.sync\.aligned \d+;", ""),
    "no barrier in a reduction": (norm, 90, r"bar\.sync\s+0;", ""),
    "a load's mask dropped": (glu, 80, r"@%p\d+ (ld\.global)", r"\1"),
    "a store's mask dropped": (glu, 90, r"@%p\d+ (st\.global)", r"\1"),
    "a row's offset in 32 bits": (
        distant_rows,
        90,
        r"mul\.lo\.s64\s+(%rd\d+), (%rd\d+), (%rd\d+);",
        r"mul.lo.s64 \1, \2, \3; cvt.s64.s32 \1, \1;",
    ),
}


@pytest.mark.parametrize("name", TRITON_FAULTS)
def test_a_fault_in_a_triton_kernel(name: str) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the Triton kernels are compiled for the GPU in this process")
    run, capability, pattern, replacement = TRITON_FAULTS[name]
    changed = []

    def plant(text: str) -> str:
        broken, count = re.subn(pattern, replacement, text)
        changed.append(count)
        return broken

    assert outcome(lambda seed: run(capability, str, seed), 1) == "right"
    found = outcome(lambda seed: run(capability, plant, seed), 10)
    assert sum(changed), "the fault changes nothing"
    assert found != "right"


def attention(change: Callable[[str], str], seed: int) -> bool:
    """Both passes by the kernels of mma.sync, whose PTX is changed."""
    from cuda_ptx import executed_cuda

    torch.manual_seed(0)
    bounds = cu_seqlens([100, 70])
    leaves = [torch.randn(170, heads, 64).bfloat16().requires_grad_() for heads in (2, 1, 1)]
    d_o = torch.randn(170, 2, 64)
    exact = reference.attention(*(x.double() for x in leaves), bounds)
    expected = [exact, *torch.autograd.grad(exact, leaves, d_o.double(), retain_graph=True)]
    with pytest.MonkeyPatch.context() as patch, executed_cuda(80, change=change, seed=seed) as made:
        patch.setattr(backends.extension, "cuda_emulation", made)
        o = ops.attention(*leaves, bounds, impl="cuda")
        found = [o.detach(), *torch.autograd.grad(o, leaves, d_o.bfloat16())]
    return all(error(x, y.double()) < 1e-2 for x, y in zip(found, expected, strict=True))


ATTENTION_FAULTS = {
    "no wait of cp.async": (r"cp\.async\.wait_all;", ""),
    "no barrier between stages": (r"bar\.sync\s+0;", ""),
    "rows that do not exist are not zero": (
        r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16), %r\d+;",
        r"\1, 16;",
    ),
    "chunks that are not swizzled": (r"xor\.b32\s+(%r\d+, %r\d+, 32;)", r"or.b32 \1"),
}


@pytest.mark.parametrize("name", ATTENTION_FAULTS)
def test_a_fault_in_attention(name: str) -> None:
    pattern, replacement = ATTENTION_FAULTS[name]
    changed = []

    def plant(text: str) -> str:
        broken, count = re.subn(pattern, replacement, text)
        changed.append(count)
        return broken

    assert outcome(lambda seed: attention(str, seed), 1) == "right"
    found = outcome(lambda seed: attention(plant, seed), 10)
    assert sum(changed), "the fault changes nothing"
    assert found != "right"
