"""Gated activations, one program for a tile of rows and columns."""

import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor

from lora_engine.backends.hardware import triton_interpreted

# Triton's interpreter knows no assembly.
_INTERPRETED: tl.constexpr = tl.constexpr(triton_interpreted())


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    """1 / (1 + exp(-x)); by the GPU's approximations of both, some ulp of float32, unless EXACT.

    Triton's own scale small numbers first: nine more instructions.
    """
    if _INTERPRETED or EXACT:
        s = tl.sigmoid(x)
    else:
        s = tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return s


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr, ELEMENT: tl.constexpr):
    """The activation of `gate` and its slope, as in csrc/cpu/activation.hpp.

    ELEMENT: the dtype that results are rounded to.
    """
    EXACT: tl.constexpr = ELEMENT.primitive_bitwidth > 16
    if ACTIVATION == "silu":
        s = _sigmoid(gate, EXACT)
        value = gate * s
        slope = s + value * (1 - s)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(x)) / 2 = sigmoid(2 x), which is 0 or 1 long before the bounds.
        c = tl.minimum(tl.maximum(gate, -40.0), 40.0)
        s = _sigmoid(c * (1.5957691216057308 + 0.0713548162726009 * c * c), EXACT)
        value = gate * s
        slope = s + value * (1 - s) * (1.5957691216057308 + 0.2140644488178027 * c * c)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        bell = tl.exp(-0.5 * gate * gate)
        t = 1 / (1 + 0.21 * tl.abs(gate))
        p = -0.071974985 * t + 0.28516203
        p = p * t - 0.33357424
        p = p * t + 0.35330862
        p = p * t - 0.09672528
        p = p * t + 0.12612234
        p = p * t + 0.06885335
        p = p * t + 0.08511984
        p = p * t + 0.083708316
        tail = bell * t * p
        phi = tl.where(gate < 0, tail, 1 - tail)
        value = gate * phi
        slope = phi + gate * (0.3989422804014327 * bell)
    return value, slope


@triton.jit
def _tile(rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows and columns of this program: neighbours in memory run side by side."""
    blocks_n = tl.cdiv(cols, BLOCK_N)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    return offs_m, offs_n, (offs_m < rows) & (offs_n < cols)


@Relaunched
@triton.jit
def _glu_fwd_kernel(
    gate_ptr,  # [rows, cols]
    up_ptr,  # [rows, cols]
    y_ptr,  # [rows, cols]
    rows,
    vec_cols,  # columns and strides in vectors of VEC elements
    stride_gate,
    stride_up,
    stride_y,
    ACTIVATION: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = act(gate) * up."""
    offs_m, offs_n, mask = _tile(rows, vec_cols * VEC, BLOCK_M, BLOCK_N)
    gate = tl.load(gate_ptr + offs_m * (stride_gate * VEC) + offs_n, mask=mask, other=0.0)
    up = tl.load(up_ptr + offs_m * (stride_up * VEC) + offs_n, mask=mask, other=0.0)
    value, _ = activated(gate.to(tl.float32), ACTIVATION, gate.dtype)
    y = value * up.to(tl.float32)
    tl.store(y_ptr + offs_m * (stride_y * VEC) + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask)


@Relaunched
@triton.jit
def _glu_bwd_kernel(
    dy_ptr,  # [rows, cols]
    gate_ptr,  # [rows, cols]
    up_ptr,  # [rows, cols]
    dgate_ptr,  # [rows, cols]
    dup_ptr,  # [rows, cols]
    h_ptr,  # [rows, cols] or None
    rows,
    vec_cols,  # columns and strides in vectors of VEC elements
    stride_dy,
    stride_gate,
    stride_up,
    stride_dgate,
    stride_dup,
    stride_h,
    ACTIVATION: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dgate = dy up act'(gate), dup = dy act(gate) and, if asked for, h = act(gate) up."""
    offs_m, offs_n, mask = _tile(rows, vec_cols * VEC, BLOCK_M, BLOCK_N)
    dy = tl.load(dy_ptr + offs_m * (stride_dy * VEC) + offs_n, mask=mask, other=0.0)
    gate = tl.load(gate_ptr + offs_m * (stride_gate * VEC) + offs_n, mask=mask, other=0.0)
    up = tl.load(up_ptr + offs_m * (stride_up * VEC) + offs_n, mask=mask, other=0.0)
    element = dgate_ptr.dtype.element_ty
    dy, gate, up = dy.to(tl.float32), gate.to(tl.float32), up.to(tl.float32)
    value, slope = activated(gate, ACTIVATION, element)
    dgate, dup = (dy * up * slope).to(element), (dy * value).to(element)
    tl.store(dgate_ptr + offs_m * (stride_dgate * VEC) + offs_n, dgate, mask=mask)
    tl.store(dup_ptr + offs_m * (stride_dup * VEC) + offs_n, dup, mask=mask)
    if h_ptr is not None:
        h = (value * up).to(element)
        tl.store(h_ptr + offs_m * (stride_h * VEC) + offs_n, h, mask=mask)


def glu_fwd(
    gate: Tensor,  # [rows, cols]
    up: Tensor,  # [rows, cols]
    y: Tensor,  # [rows, cols]
    *,
    activation: str,
) -> None:
    """Writes y. Launch size: cols."""
    rows, cols = gate.shape
    if gate.numel() == 0:
        return
    config = launch.config("glu_fwd", gate.device, gate.dtype, cols)
    strides = gate.stride(0), up.stride(0), y.stride(0)
    vec = launch.vector(gate.dtype, cols, *strides)
    _glu_fwd_kernel[_grid(rows, cols, config)](
        gate,
        up,
        y,
        rows,
        cols // vec,
        *(stride // vec for stride in strides),
        ACTIVATION=activation,
        VEC=vec,
        **config,
    )


def glu_bwd(
    dy: Tensor,  # [rows, cols]
    gate: Tensor,  # [rows, cols]
    up: Tensor,  # [rows, cols]
    dgate: Tensor,  # [rows, cols]; may be gate
    dup: Tensor,  # [rows, cols]; may be up
    h: Tensor | None = None,  # [rows, cols]
    *,
    activation: str,
) -> None:
    """Writes dgate and dup, and the forward result into h if given. Launch size: cols."""
    rows, cols = gate.shape
    if gate.numel() == 0:
        return
    config = launch.config("glu_bwd", gate.device, gate.dtype, cols)
    strides = [x.stride(0) for x in (dy, gate, up, dgate, dup, dup if h is None else h)]
    vec = launch.vector(gate.dtype, cols, *strides)
    _glu_bwd_kernel[_grid(rows, cols, config)](
        dy,
        gate,
        up,
        dgate,
        dup,
        h,
        rows,
        cols // vec,
        *(stride // vec for stride in strides),
        ACTIVATION=activation,
        VEC=vec,
        **config,
    )


def _grid(rows: int, cols: int, config: dict[str, int]) -> tuple[int]:
    return (launch.cdiv(rows, config["BLOCK_M"]) * launch.cdiv(cols, config["BLOCK_N"]),)
