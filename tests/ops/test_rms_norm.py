import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Backend
from oracle import check
from torch import Tensor

from lora_engine import ops, reference
from lora_engine.backends import launchers
from lora_engine.backends.selection import launch_parameters
from lora_engine.errors import UnavailableError
from lora_engine.ops import augmented

OPERATION = "rms_norm"
EPS = 1e-5


def peer(x: Tensor, weight: Tensor, residual: Tensor | None = None, offset: float = 0.0) -> Tensor:
    h = x if residual is None else x + residual
    normed = torch.nn.functional.rms_norm(h, x.shape[-1:], weight + offset, EPS)
    return normed if residual is None else torch.stack((normed, h))


def inputs(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    x, weight, residual = torch.randn(shape), torch.randn(shape[-1]), 2 * torch.randn(shape)
    return backend.put(x.to(dtype), weight.to(dtype), residual.to(dtype))


SHAPES = [(1, 1), (3, 63), (2, 5, 576), (65, 100), (5, 1000), (3, 1025), (0, 8)]


@pytest.mark.reference
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(
    backend: Backend, dtype: torch.dtype, poisoned: None, shape: tuple[int, ...]
) -> None:
    x, weight, _ = inputs(backend, dtype, shape)
    ours = lambda x, w: ops.rms_norm(x, w, EPS, impl=backend.impl)  # noqa: E731
    check(ours, peer, [x, weight], floor=0.1)


@pytest.mark.reference
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 63), (2, 5, 576), (0, 8)], ids=str)
def test_residual_matches_oracle(
    backend: Backend, dtype: torch.dtype, poisoned: None, shape: tuple[int, ...], offset: float
) -> None:
    def ours(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        pair = ops.rms_norm(x, weight, EPS, residual=residual, offset=offset, impl=backend.impl)
        return torch.stack(pair)

    theirs = lambda x, w, r: peer(x, w, r, offset)  # noqa: E731
    check(ours, theirs, inputs(backend, dtype, shape), floor=0.1)


@pytest.mark.parametrize("cols", [4097, 20000])
def test_wide_rows(backend: Backend, poisoned: None, cols: int) -> None:
    """20000 columns are more than a Triton program holds: rows and sums are walked in blocks."""

    def ours(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return torch.stack(ops.rms_norm(x, weight, EPS, residual=residual, impl=backend.impl))

    check(ours, peer, inputs(backend, torch.float32, (9, cols)), floor=0.1)


def test_the_sum_is_rounded_before_it_is_normed(backend: Backend) -> None:
    """What is normed is the h that the next layer sees, not a more exact one."""
    x, weight, residual = inputs(backend, torch.bfloat16, (3, 64))
    y, h = ops.rms_norm(x, weight, EPS, residual=residual, impl=backend.impl)
    assert torch.equal(y, ops.rms_norm(h, weight, EPS, impl=backend.impl))


@pytest.mark.parametrize("used", ["normed", "h"])
def test_one_output_used_alone(backend: Backend, poisoned: None, used: str) -> None:
    """The other's gradient does not arrive, and nothing is made in its place."""
    x, weight, residual = (t.requires_grad_() for t in inputs(backend, torch.float32, (5, 48)))
    pick = 0 if used == "normed" else 1
    ours = ops.rms_norm(x, weight, EPS, residual=residual, impl=backend.impl)[pick]
    theirs = reference.rms_norm(x, weight, EPS, residual=residual)[pick]
    dy = torch.randn(5, 48).to(x)
    leaves = [x, weight, residual] if used == "normed" else [x, residual]
    expected = torch.autograd.grad(theirs, leaves, dy)
    for grad, exact in zip(torch.autograd.grad(ours, leaves, dy), expected, strict=True):
        assert torch.allclose(grad, exact, rtol=1e-4, atol=1e-5)
    if used == "h":
        grads = torch.autograd.grad(
            ops.rms_norm(x, weight, EPS, residual=residual, impl=backend.impl)[1].sum(),
            [x, weight],
            allow_unused=True,
        )
        assert grads[1] is None and torch.equal(grads[0], torch.ones_like(x))


@pytest.mark.reference
def test_a_chain_of_residuals(backend: Backend) -> None:
    """As in a model: h of one norm is the next one's residual, and every weight trains."""
    x, weight, residual = inputs(backend, torch.float32, (6, 64))

    def chain(norm: object, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        for _ in range(3):
            y, residual = norm(x, weight, residual)  # type: ignore[operator]
            x = torch.tanh(y)
        return x + residual

    ours = lambda x, w, r: ops.rms_norm(x, w, EPS, residual=r, impl=backend.impl)  # noqa: E731
    theirs = lambda x, w, r: peer(x, w, r).unbind()  # noqa: E731
    check(lambda *a: chain(ours, *a), lambda *a: chain(theirs, *a), [x, weight, residual])


def test_rows_need_not_be_contiguous(backend: Backend) -> None:
    x, residual = torch.randn(7, 40)[:, 3:35], torch.randn(32, 7).t()
    tensors = [x, torch.randn(32), residual]
    on_device = [t if t.device == backend.device else t.to(backend.device) for t in tensors]

    def ours(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        wide = torch.cat((x, x), dim=1)[:, : x.shape[1]]
        pair = ops.rms_norm(wide, weight, EPS, residual=residual.t().contiguous().t(),
                            impl=backend.impl)  # fmt: skip
        return torch.stack(pair)

    check(ours, peer, on_device)


def test_frozen_weight_gets_no_gradient(backend: Backend) -> None:
    x, weight, _ = inputs(backend, torch.float32, (4, 8))
    x.requires_grad_()
    ops.rms_norm(x, weight, EPS, impl=backend.impl).sum().backward()
    assert weight.grad is None and x.grad is not None


@pytest.mark.parametrize("value", [1e4, -1e4, 1e18, 1e-30, 1e-42], ids=str)
def test_extreme_values(backend: Backend, value: float) -> None:
    x = torch.full((2, 64), value)
    x[:, ::3] *= -0.5
    weight = torch.linspace(0.5, 2.0, 64)
    ours = lambda x, w: ops.rms_norm(x, w, EPS, impl=backend.impl)  # noqa: E731
    check(ours, peer, backend.put(x, weight))
    x, ones = backend.put(x, torch.ones(64))
    exact = reference.rms_norm(x.double(), ones.double(), EPS)
    assert torch.allclose(ours(x, ones).double(), exact, rtol=1e-5, atol=1e-44)


def test_nan_stays_in_its_row(backend: Backend) -> None:
    x, weight, residual = inputs(backend, torch.float32, (3, 40))
    residual[1, 17] = float("nan")
    y, h = ops.rms_norm(x, weight, EPS, residual=residual, impl=backend.impl)
    assert y.isnan().any(1).tolist() == [False, True, False]
    assert h.isnan().nonzero().tolist() == [[1, 17]]


def test_the_same_bits_on_every_run(backend: Backend) -> None:
    x, weight, residual = (t.requires_grad_() for t in inputs(backend, torch.float32, (150, 48)))
    dy = torch.randn(2, 150, 48).to(x)
    runs = []
    for _ in range(2):
        y, h = ops.rms_norm(x, weight, EPS, residual=residual, impl=backend.impl)
        runs.append([y, h, *torch.autograd.grad((y, h), [x, weight, residual], tuple(dy))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_weight_gradient_is_the_same_for_any_number_of_threads(isa: str) -> None:
    x, weight = torch.randn(300, 48), torch.randn(48, requires_grad=True)
    grads = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        grads.append(torch.autograd.grad(ops.rms_norm(x, weight, EPS).sum(), weight)[0])
    assert torch.equal(*grads)


def test_room_behind_the_rows(backend: Backend) -> None:
    """lora_linear gets the padding columns it asked for behind the result."""
    x, weight, residual = (t.requires_grad_() for t in inputs(backend, torch.float32, (3, 5, 32)))
    y, h = ops.rms_norm(x, weight, EPS, residual=residual, padding_columns=8, impl=backend.impl)
    buffer = augmented.claim([y], 8)
    assert buffer.shape == (15, 40) and buffer.data_ptr() == y.data_ptr() and h.is_contiguous()
    plain = ops.rms_norm(x, weight, EPS, residual=residual, impl=backend.impl)
    assert torch.equal(y, plain[0]) and torch.equal(h, plain[1])
    dy = torch.randn_like(x), torch.randn_like(x)
    dx = torch.autograd.grad((y, h), x, dy)[0]
    expected = torch.autograd.grad(plain, x, dy)[0]
    assert torch.equal(dx, expected)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(1, 130),
    padding_columns=st.integers(0, 9),
    offset=st.sampled_from([0.0, 1.0, -0.5]),
    with_residual=st.booleans(),
    trained=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_any_shape(
    rows: int,
    cols: int,
    padding_columns: int,
    offset: float,
    with_residual: bool,
    trained: list[bool],
) -> None:
    tensors = torch.randn(rows, cols), torch.randn(cols), torch.randn(rows, cols)
    x, weight, residual = (t.requires_grad_(on) for t, on in zip(tensors, trained, strict=True))
    added = residual if with_residual else None
    ours = ops.rms_norm(
        x, weight, EPS, residual=added, offset=offset, padding_columns=padding_columns
    )
    theirs = reference.rms_norm(x, weight, EPS, residual=added, offset=offset)
    ours, theirs = (pair if with_residual else (pair,) for pair in (ours, theirs))
    assert rows < 2 or ours[0].stride(0) == cols + padding_columns
    leaves = [t for t in (x, weight, added) if t is not None and t.requires_grad]
    if leaves:
        used = [(a, b) for a, b in zip(ours, theirs, strict=True) if b.requires_grad]
        dy = [torch.randn_like(a) for a, _ in used]
        ours += torch.autograd.grad([a for a, _ in used], leaves, dy)
        theirs += torch.autograd.grad([b for _, b in used], leaves, dy)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str) -> None:
    x, residual = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True).unbind()
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, EPS, impl=impl), (x, weight))
    assert torch.autograd.gradcheck(
        lambda x, w, r: ops.rms_norm(x, w, EPS, residual=r, offset=1.0, impl=impl),
        (x, weight, residual),
    )


def test_triton_shares_rows_without_leaving_one() -> None:
    from lora_engine.backends.triton import norm_rows

    for rows in (1, 5, 31, 32, 33, 1000):
        for block_m in (1, 2, 8):
            share = norm_rows.rows_per_program(rows, block_m, 8)
            programs = -(-rows // share)
            assert programs <= 8 and share % block_m == 0 and (programs - 1) * share < rows


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_a_row_is_summed_alike_with_and_without_a_trained_weight(norm: str) -> None:
    """Else x's gradient would have other bits when it is asked for alone on a GPU."""
    for capability in (80, 90):
        for size in (64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 40000):
            frozen, trained = (
                launch_parameters(norm + kernel, capability, torch.bfloat16, size)
                for kernel in ("_bwd", "_bwd_dw")
            )
            for name in ("BLOCK_N", "num_warps"):
                assert frozen[name] == trained[name], (capability, size)


def test_errors_name_the_shapes() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"weight \[4\] float32 does not fit x \[2, 3\] float32"):
        ops.rms_norm(x, torch.ones(4), EPS)
    with pytest.raises(ValueError, match="differ in dtype"):
        ops.rms_norm(x, torch.ones(3).bfloat16(), EPS)
    with pytest.raises(ValueError, match=r"residual \[3\] float32 and x \[2, 3\] float32 differ"):
        ops.rms_norm(x, torch.ones(3), EPS, residual=torch.ones(3))
    with pytest.raises(ValueError, match=r"residual .* bfloat16 and x"):
        ops.rms_norm(x, torch.ones(3), EPS, residual=x.bfloat16())
    with pytest.raises(ValueError, match="impl='fast': expected one of"):
        ops.rms_norm(x, torch.ones(3), EPS, impl="fast")
    with pytest.raises(UnavailableError, match="float16"):
        ops.rms_norm(x.half(), torch.ones(3).half(), EPS, impl="cpu")


@pytest.mark.parametrize("cols", [8, 63, 40_000])
def test_x_is_copied_to_h_without_a_residual(
    backend: Backend, dtype: torch.dtype, poisoned: None, cols: int
) -> None:
    torch.manual_seed(0)
    kernels = launchers.rms_norm(backend.impl)
    x = backend.put(torch.randn(5, cols + 3).to(dtype))[0][:, :cols]
    (weight,) = backend.put(torch.randn(cols).to(dtype))
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    rstd = torch.empty(5, dtype=accumulate, device=backend.device)
    y, alone, h = (torch.empty(5, cols, dtype=dtype, device=backend.device) for _ in range(3))
    kernels.rms_norm_fwd(x, None, weight, alone, None, rstd, EPS, 0.0)
    kernels.rms_norm_fwd(x, None, weight, y, h, rstd, EPS, 0.0)
    assert torch.equal(h, x)
    assert torch.equal(y, alone)


@pytest.mark.parametrize("heads,cols", [(3, 8), (2, 63)])
def test_heads_side_by_side_are_rows(
    backend: Backend, dtype: torch.dtype, poisoned: None, heads: int, cols: int
) -> None:
    """Of a wider buffer, the gradient written over the one that comes in: the same bits."""
    torch.manual_seed(0)
    kernels = launchers.rms_norm(backend.impl)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    wide = backend.put(torch.randn(2, 37, heads * cols + 5).to(dtype))[0]
    x, dy = (part[:, : heads * cols].unflatten(1, (heads, cols)) for part in wide)
    (weight,) = backend.put(torch.randn(cols).to(dtype))
    rows, dy_rows = (part.reshape(-1, cols) for part in (x, dy))

    def run(x: Tensor, dy: Tensor, y: Tensor, dx: Tensor) -> list[Tensor]:
        rstd = torch.empty(37 * heads, dtype=accumulate, device=backend.device)
        dweight = torch.empty(cols, dtype=accumulate, device=backend.device)
        kernels.rms_norm_fwd(x, None, weight, y, None, rstd, EPS, 1.0)
        kernels.rms_norm_bwd(dy, None, x, weight, rstd, dx, dweight, 1.0)
        return [y, rstd, dweight, dx]

    expected = run(rows, dy_rows, torch.empty_like(rows), torch.empty_like(rows))
    actual = run(x, dy, torch.empty_like(x), dy)
    for name, ours, theirs in zip(("y", "rstd", "dweight", "dx"), actual, expected, strict=True):
        assert torch.equal(ours.reshape(theirs.shape), theirs), name
