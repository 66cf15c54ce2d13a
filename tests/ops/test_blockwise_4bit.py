"""NF4 and FP4: bit for bit bitsandbytes' codes, scales and values, by every implementation."""

import itertools
import math
import mmap
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TypeAlias, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Backend
from torch import Tensor

from lora_engine import ops
from lora_engine.quantization.blockwise_4bit import (
    BLOCKS,
    Blockwise4bit,
    Code,
    ascending_codes,
    code_bounds,
    code_values,
)
from lora_engine.quantization.format import Entry
from lora_engine.quantization.nested_absmax import (
    _codes_of_grid,
    dequantize_absmax,
    nested_code,
)

OPERATION = "blockwise_4bit"
pytestmark = pytest.mark.reference
CODES: tuple[Code, ...] = get_args(Code)
# Whole and ragged last blocks, rows that end inside a block or a byte.
SHAPES = [(64, 64), (7, 33), (1, 1), (3, 5), (40, 96), (130, 128), (9, 4096)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape)


def heavy(shape: tuple[int, int]) -> Tensor:
    return torch.distributions.StudentT(1.5).sample(torch.Size(shape))


def constant(shape: tuple[int, int]) -> Tensor:
    return torch.full(shape, -0.3)


def zero_blocks(shape: tuple[int, int]) -> Tensor:
    w = torch.randn(shape)
    w[: max(1, shape[0] // 2)] = 0
    return w


def extreme(shape: tuple[int, int]) -> Tensor:
    """From denormals to the largest that float16 holds, blocks of each among them."""
    size = shape[0] * shape[1]
    scales = torch.tensor([1e-42, 1e-30, 1.0, 6e4])[torch.arange(size) // 64 % 4]
    return (torch.rand(size) * scales).view(shape)


Kind: TypeAlias = Callable[[tuple[int, int]], Tensor]
KINDS: list[Kind] = [normal, heavy, constant, zero_blocks, extreme]


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes").functional


def test_tables_are_those_of_bitsandbytes(bnb: ModuleType) -> None:
    for code in CODES:
        assert torch.equal(code_values(code), bnb.get_4bit_type(code, "cpu"))
    assert torch.equal(nested_code(), bnb.create_dynamic_map())


@pytest.mark.parametrize("code", CODES)
def test_ascending_codes_and_bounds(code: Code) -> None:
    codes, values = ascending_codes(code), code_values(code)
    assert sorted(codes.tolist()) == list(range(16))
    ascending = values[codes.long()]
    assert torch.equal(ascending, values.sort().values)
    bounds = code_bounds(code)
    assert bool(((ascending[:-1] <= bounds) & (bounds <= ascending[1:])).all())


CASES = list(itertools.product(SHAPES, DTYPES, BLOCKS))


def is_interpreted(backend: Backend) -> bool:
    return backend.impl in ("triton", "cuda") and backend.device.type == "cpu"


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_reference(
    kind: Kind, code: Code, nested: bool, backend: Backend
) -> None:
    """Of what one implementation packs, too: each decodes the other's."""
    torch.manual_seed(0)
    cases = CASES
    if backend.device.type == "cpu":  # interpreted, or compared with bitsandbytes as well
        cases = CASES[4 * KINDS.index(kind) + 2 * CODES.index(code) + nested :: 53]
    for shape, dtype, block in cases:
        w, format = kind(shape).to(dtype), Blockwise4bit(code, block, nested)
        (there,) = backend.put(w)
        ours = ops.quantize_4bit(there, format, impl=backend.impl)
        theirs = ops.quantize_4bit(w, format, impl="reference")
        case = f"{list(shape)} {dtype} {block}"
        assert torch.equal(ours["codes"].cpu(), theirs["codes"]), case
        if nested:  # the mean of all scales, which a GPU adds up in another order
            torch.testing.assert_close(ours["offset"].cpu(), theirs["offset"], rtol=1e-5, atol=0)
        else:
            assert torch.equal(ours["absmax"].cpu(), theirs["absmax"]), case
        for packed in (ours, theirs):
            w_hat, expected = torch.empty_like(there), torch.empty_like(w)
            of_backend = {name: tensor.to(there.device) for name, tensor in packed.items()}
            on_cpu = {name: tensor.cpu() for name, tensor in packed.items()}
            ops.dequantize_4bit_(w_hat, of_backend, format, impl=backend.impl)
            ops.dequantize_4bit_(expected, on_cpu, format, impl="reference")
            assert torch.equal(w_hat.cpu(), expected), case


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_bitsandbytes(
    kind: Kind, code: Code, nested: bool, backend: Backend, bnb: ModuleType
) -> None:
    torch.manual_seed(0)
    if is_interpreted(backend):
        pytest.skip("compared with the reference")
    # Half of the cases each, so that codes, nested or not, see all of them of every kind.
    for shape, dtype, block in CASES[(KINDS.index(kind) + CODES.index(code) + nested) % 2 :: 2]:
        w = kind(shape).to(dtype)
        format = Blockwise4bit(code, block, nested)
        (there,) = backend.put(w)
        ours = ops.quantize_4bit(there, format, impl=backend.impl)
        codes, state = bnb.quantize_4bit(
            w, blocksize=block, quant_type=code, compress_statistics=nested
        )
        case = f"{list(shape)} {dtype} {block}"
        assert torch.equal(ours["codes"].cpu(), codes.view(-1)), case
        if nested and backend.device.type == "cuda":
            # The mean of all scales, which a GPU adds up in another order.
            torch.testing.assert_close(ours["offset"].cpu(), state.offset, rtol=1e-5, atol=0)
            scales = (ours[name].cpu() for name in format.layout(shape) if name != "codes")
            absmax = dequantize_absmax(*scales)
        elif nested:
            assert torch.equal(ours["absmax"], state.absmax), case
            assert torch.equal(ours["nested_absmax"], state.state2.absmax), case
            assert torch.equal(ours["offset"], state.offset), case
            absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        else:
            absmax = state.absmax
            assert torch.equal(ours["absmax"].cpu(), absmax), case
        w_hat = torch.empty_like(there)
        ops.dequantize_4bit_(w_hat, ours, format, impl=backend.impl)
        assert torch.equal(w_hat.cpu(), values_of(codes.view(-1), absmax, format, w)), case


def values_of(codes: Tensor, absmax: Tensor, format: Blockwise4bit, like: Tensor) -> Tensor:
    """By the definition: codes of the upper halves of bytes, then of the lower; times absmax.

    bitsandbytes' own function reads another row's scale where a block is longer than a row.
    """
    table = code_values(format.code)
    both = torch.stack([table[(codes >> 4).long()], table[(codes & 15).long()]], dim=1)
    scales = absmax.repeat_interleave(format.block)[: like.numel()]
    return (both.view(-1)[: like.numel()] * scales).view(like.shape).to(like.dtype)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("kept", DTYPES)
def test_values_are_those_of_bitsandbytes(
    code: Code, kept: torch.dtype, backend: Backend, bnb: ModuleType
) -> None:
    torch.manual_seed(1)
    w = torch.randn(96, 512).to(kept)
    for block in (32, 64, 512):
        codes, state = bnb.quantize_4bit(w, blocksize=block, quant_type=code)
        packed, absmax = backend.put(codes.view(-1), state.absmax)
        w_hat = torch.empty_like(w, device=backend.device)
        tensors = {"codes": packed, "absmax": absmax}
        ops.dequantize_4bit_(w_hat, tensors, Blockwise4bit(code, block), impl=backend.impl)
        assert torch.equal(
            w_hat.cpu(), values_of(codes.view(-1), state.absmax, Blockwise4bit(code, block), w)
        )
        # Its kernels for some processors round to float16 twice.
        theirs = bnb.dequantize_4bit(codes, state)
        torch.testing.assert_close(w_hat.cpu(), theirs, rtol=torch.finfo(kept).eps, atol=0)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kept", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_into_a_wider_buffer(
    shape: tuple[int, int], kept: torch.dtype, nested: bool, backend: Backend
) -> None:
    torch.manual_seed(2)
    rows, cols = shape
    format = Blockwise4bit("nf4", 32, nested)
    (w,) = backend.put(torch.randn(shape))
    tensors = ops.quantize_4bit(w, format, impl=backend.impl)
    whole = torch.empty(shape, dtype=kept, device=w.device)
    ops.dequantize_4bit_(whole, tensors, format, impl=backend.impl)
    for start, stop in {(0, rows), (rows // 2, rows), (rows // 3, rows // 3 + 1)}:
        wide = torch.full((stop - start, cols + 7), 2.0, dtype=kept, device=w.device)
        ops.dequantize_4bit_(wide[:, :cols], tensors, format, first_row=start, impl=backend.impl)
        assert torch.equal(wide[:, :cols], whole[start:stop])
        assert bool((wide[:, cols:] == 2.0).all())


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_codes_at_any_address(offset: int, backend: Backend) -> None:
    """As of a weight that is a part of a larger buffer: words of them may not be aligned."""
    format = Blockwise4bit("nf4", 64)
    w = torch.randn(16, 128).bfloat16()
    tensors = ops.quantize_4bit(*backend.put(w), format, impl=backend.impl)
    codes = torch.empty(len(tensors["codes"]) + offset, dtype=torch.uint8, device=backend.device)
    moved = {**tensors, "codes": codes[offset:].copy_(tensors["codes"])}
    found, expected = (torch.empty_like(w, device=backend.device) for _ in range(2))
    ops.dequantize_4bit_(found, moved, format, impl=backend.impl)
    ops.dequantize_4bit_(expected, tensors, format, impl=backend.impl)
    assert torch.equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 130),
    block=st.sampled_from(BLOCKS),
    code=st.sampled_from(CODES),
    seed=st.integers(0, 2**31),
)
def test_error_monotony_and_round_trip(
    rows: int, cols: int, block: int, code: Code, seed: int
) -> None:
    """Within a block: errors of at most half a gap, order kept, quantised again the same."""
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    format = Blockwise4bit(code, block)
    tensors = ops.quantize_4bit(w, format)
    w_hat = torch.empty_like(w)
    ops.dequantize_4bit_(w_hat, tensors, format)
    half_gap = code_values(code).sort().values.diff().max() / 2 * (1 + 1e-6)
    scales = tensors["absmax"].repeat_interleave(block)[: w.numel()].view_as(w)
    assert bool(((w - w_hat).abs() <= half_gap * scales).all())
    for part, part_hat in zip(w.view(-1).split(block), w_hat.view(-1).split(block), strict=True):
        assert bool((part_hat[part.argsort()].diff() >= 0).all())
    again = ops.quantize_4bit(w_hat, format)
    w_again = torch.empty_like(w)
    ops.dequantize_4bit_(w_again, again, format)
    assert torch.equal(w_again, w_hat)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-20])
def test_values_at_and_beside_every_bound(code: Code, scale: float, backend: Backend) -> None:
    """A bound takes the code below it. Scales are powers of two: what is compared is exact."""
    bounds, even = code_bounds(code), torch.arange(-1024, 1025) / 1024
    parts = torch.arange(-29, 30, 2) / 30  # where n / 15 is rounded to another n
    points = torch.cat([bounds, parts])
    beside = [torch.nextafter(points, torch.tensor(to)) for to in (-2.0, 2.0)]
    x = torch.cat([points, *beside, even])
    x = torch.nn.functional.pad(x, (0, -len(x) % 31)).view(-1, 31)
    x = torch.nn.functional.pad(x, (1, 0), value=1.0)  # in each block of 32 the largest
    x = x * scale / scale  # what lies beside zero may vanish
    (w,) = backend.put(x * scale)
    tensors = ops.quantize_4bit(w, Blockwise4bit(code, 32), impl=backend.impl)
    both = tensors["codes"].cpu()
    codes = torch.stack([both >> 4, both & 15], dim=1).view_as(x)
    assert torch.equal(codes, ascending_codes(code)[torch.bucketize(x, bounds)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 70), (8, 98)])
def test_values_that_are_not_finite_are_refused(
    value: float, place: tuple[int, int], backend: Backend
) -> None:
    (w,) = backend.put(torch.randn(9, 99))
    w[place] = value
    for nested in (False, True):
        with pytest.raises(ValueError, match="not finite"):
            ops.quantize_4bit(w, Blockwise4bit("nf4", 64, nested), impl=backend.impl)


def test_scales_without_a_finite_mean_are_refused() -> None:
    w = torch.full((4, 64), 3e38)
    assert torch.equal(ops.quantize_weight(w).dequantize(), w)
    with pytest.raises(ValueError, match="mean of the scales is not finite"):
        ops.quantize_weight(w, double_quant=True)


def test_weights_without_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="on meta, which holds no numbers"):
        ops.quantize_weight(torch.empty(4, 64, device="meta"))
    with pytest.raises(ValueError, match="float8_e4m3fn, expected a matrix of float32"):
        ops.quantize_weight(torch.zeros(4, 64).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_torch_defaults(dtype: torch.dtype) -> None:
    """A program may load a model under a default dtype or a default device of its own."""
    w = torch.randn(600, 64)
    expected = ops.quantize_weight(w, double_quant=True)
    nested_code.cache_clear()
    _codes_of_grid.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            found = ops.quantize_weight(w, double_quant=True)
            state = found.state_dict("w")
            read = ops.QuantizedWeight.from_state_dict(state, "w")
            w_hat = read.rows(0, 600)
    finally:
        torch.set_default_dtype(before)
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name
    assert torch.equal(w_hat, expected.dequantize())


def test_places_beyond_two_to_the_thirty_second(backend: Backend) -> None:
    """Of a weight that is all zeros but for the last row: on a CPU in memory nobody touches."""
    rows, cols = 2**20 + 1, 4096
    format, last = Blockwise4bit("nf4", 64), Blockwise4bit("nf4", 64).layout((1, cols))
    parts = {
        "codes": torch.randint(0, 256, last["codes"].shape).to(torch.uint8),
        "absmax": torch.rand(last["absmax"].shape),
    }

    def zeros(entry: Entry) -> Tensor:
        if backend.device.type == "cuda":
            return torch.zeros(entry.shape, dtype=entry.dtype, device=backend.device)
        memory = mmap.mmap(-1, math.prod(entry.shape) * entry.dtype.itemsize)
        return torch.frombuffer(memory, dtype=entry.dtype)

    tensors = {name: zeros(entry) for name, entry in format.layout((rows, cols)).items()}
    for name, tensor in tensors.items():
        tensor[-parts[name].numel() :] = parts[name]
    found, expected = torch.empty(1, cols, device=backend.device), torch.empty(1, cols)
    ops.dequantize_4bit_(found, tensors, format, first_row=rows - 1, impl=backend.impl)
    ops.dequantize_4bit_(expected, parts, format, impl="reference")
    assert torch.equal(found.cpu(), expected)


def test_what_does_not_fit_is_refused(backend: Backend) -> None:
    format = Blockwise4bit()
    for w in (torch.randn(4), torch.ones(4, 4, dtype=torch.int64), torch.randn(0, 64)):
        with pytest.raises(ValueError, match="expected a matrix"):
            ops.quantize_4bit(*backend.put(w), format, impl=backend.impl)
    tensors = ops.quantize_4bit(*backend.put(torch.randn(4, 64)), format, impl=backend.impl)
    for changed in (
        {"codes": tensors["codes"]},
        tensors | {"absmax": tensors["absmax"][:-1]},
        tensors | {"absmax": tensors["absmax"].double()},
    ):
        with pytest.raises(ValueError, match="do not lie within absmax"):
            ops.dequantize_4bit_(torch.empty(4, 64), changed, format, impl=backend.impl)
    for rows, first in ((5, 0), (1, 4), (1, -1)):
        with pytest.raises(ValueError, match="rows"):
            ops.dequantize_4bit_(
                torch.empty(rows, 64, device=backend.device),
                tensors,
                format,
                first_row=first,
                impl=backend.impl,
            )
    with pytest.raises(ValueError, match="block 48"):
        Blockwise4bit("nf4", 48)
