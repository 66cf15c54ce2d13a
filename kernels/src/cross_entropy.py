"""Softmax cross-entropy of rows of logits, one program for a row.

The first pass keeps a running maximum and sum for each lane (a group of VECTOR columns that one
thread loads at once), so that nothing crosses threads before its end. The second, from the last
tile to the first, finds what the first read last still in the L2 cache.
"""

import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor

# Stands for -inf where two of them would be subtracted.
_LOWEST = tl.constexpr(-3.4028234e38)

# Triton knows of a stride only that it is, or is not, a multiple of 16 elements. Rows that are not
# are read one element at a time, and a thread's elements lie apart.
_ALIGNED_STRIDE = 16


@triton.jit
def _logit(x, cap, HAS_CAP: tl.constexpr):
    """z of a logit. 1 - 2 / (exp(2y) + 1) is tanh(y) but cancels near 0: there, the series."""
    if HAS_CAP:
        y = x / cap
        square = y * y
        series = -0.053968254 * square + 0.13333333
        series = series * square - 0.33333333
        series = y + y * square * series
        z = cap * tl.where(square < 0.04, series, 1 - 2 / (tl.exp(2 * y) + 1))
    else:
        z = x
    return z


@triton.jit
def _tile(row_ptr, start, lanes, columns, cols, cap, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """A tile [LANES, VECTOR] of the row: raw and capped; -inf beyond its end."""
    offs = start + lanes[:, None] * columns.shape[0] + columns[None, :]
    if MASKED:
        x = tl.load(row_ptr + offs, mask=offs < cols, other=float("-inf")).to(tl.float32)
        z = tl.where(offs < cols, _logit(x, cap, HAS_CAP), float("-inf"))
    else:
        x = tl.load(row_ptr + offs).to(tl.float32)
        z = _logit(x, cap, HAS_CAP)
    return offs, x, z


@triton.jit
def _add_tile(
    row_ptr,
    start,
    lanes,
    columns,
    cols,
    cap,
    highest_x,
    running_max,
    running_sum,
    sum_pd,
    sum_z,
    count,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The lanes' running values after one more tile.

    Of each lane: the running maximum of z and the running sum of exp(z - maximum), as in online
    softmax; the maximum of x before the cap; the sum of p d, d = z - maximum, for the entropy; and
    the sum and number of z above -inf, for label smoothing.
    """
    _, x, z = _tile(row_ptr, start, lanes, columns, cols, cap, HAS_CAP, MASKED)
    if HAS_CAP:
        highest_x = tl.maximum(highest_x, tl.max(x, axis=1))
    new_max = tl.maximum(running_max, tl.max(z, axis=1))
    max_change = running_max - new_max
    d = z - new_max[:, None]
    p = tl.exp(d)
    rescale = tl.exp(max_change)
    if ENTROPY:
        sum_pd = rescale * (sum_pd + running_sum * max_change) + tl.sum(
            tl.where(p == 0, 0.0, p * d), axis=1
        )
    if SMOOTH:
        present = z > float("-inf")
        sum_z += tl.sum(tl.where(present, z, 0.0), axis=1)
        count += tl.sum(present.to(tl.int32), axis=1)
    running_sum = rescale * running_sum + tl.sum(p, axis=1)
    return highest_x, new_max, running_sum, sum_pd, sum_z, count


@triton.jit
def _gradient_tile(
    row_ptr,
    grad_ptr,
    start,
    lanes,
    columns,
    cols,
    target,
    cap,
    lse,
    scale_p,
    scale_target,
    smoothing_share,
    HAS_CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Writes the gradient of one tile."""
    offs, _, z = _tile(row_ptr, start, lanes, columns, cols, cap, HAS_CAP, MASKED)
    grad = scale_p * tl.exp(z - lse)
    if SMOOTH:
        grad = tl.where(z > float("-inf"), grad - smoothing_share, 0.0)
    grad = tl.where(offs == target, grad - scale_target, grad)
    if HAS_CAP:
        ratio = z / cap
        grad = grad * (1 - ratio * ratio)
    if MASKED:
        tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=offs < cols)
    else:
        tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty))


@Relaunched
@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # [rows, cols]
    target_ptr,  # [rows]
    loss_ptr,  # [rows]
    logprob_ptr,  # [rows]
    correct_ptr,  # [rows]
    entropy_ptr,  # [rows]
    lse_ptr,  # [rows]
    grad_ptr,  # [rows, cols]; may be logits_ptr
    grad_scale_ptr,  # [rows]
    cols,
    stride_logits,
    stride_grad,
    ignore_index,
    label_smoothing,
    cap,
    z_loss,
    HAS_CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_LSE: tl.constexpr,
    LSE_GIVEN: tl.constexpr,
    GRADIENT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A row's loss and gradient, with z = cap tanh(x / cap) over the K columns that are not -inf:

        lse = log sum exp z    p = exp(z - lse)    logprob = z_t - lse    entropy = lse - sum p z
        loss = lse - (1 - s) z_t - s / K sum z + w lse^2
        dx_j = ((1 + 2 w lse) p_j - (1 - s) [j = t] - s / K) (1 - (z_j / cap)^2) * grad_scale

    t is the target, s the label smoothing, w the z-loss.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    lanes = tl.arange(0, BLOCK_N // VECTOR)
    columns = tl.arange(0, VECTOR)
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    whole = cols // BLOCK_N
    ragged = whole * BLOCK_N < cols
    if ignored:
        if not LSE_GIVEN:
            tl.store(loss_ptr + row, 0.0)
            tl.store(logprob_ptr + row, 0.0)
            tl.store(correct_ptr + row, 0)
            if ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
            if HAS_LSE:
                tl.store(lse_ptr + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros((BLOCK_N // VECTOR, VECTOR), grad_ptr.dtype.element_ty)
            out_ptr = grad_ptr + row * stride_grad
            offs = lanes[:, None] * VECTOR + columns[None, :]
            for tile in range(whole):
                tl.store(out_ptr + tile * BLOCK_N + offs, zeros)
            if ragged:
                offs += whole * BLOCK_N
                tl.store(out_ptr + offs, zeros, mask=offs < cols)
    else:
        classes = 1.0
        if LSE_GIVEN:
            lse = tl.load(lse_ptr + row)
        if (not LSE_GIVEN) or SMOOTH:
            running_max = tl.full((BLOCK_N // VECTOR,), _LOWEST, tl.float32)
            highest_x = running_max
            running_sum = tl.zeros((BLOCK_N // VECTOR,), tl.float32)
            sum_pd = running_sum
            sum_z = running_sum
            count = tl.zeros((BLOCK_N // VECTOR,), tl.int32)
            # Triton 3.6 asserts that what a loop sums is used once after it: not by this `if`.
            if ragged:
                highest_x, running_max, running_sum, sum_pd, sum_z, count = _add_tile(
                    row_ptr, whole * BLOCK_N, lanes, columns, cols, cap,
                    highest_x, running_max, running_sum, sum_pd, sum_z, count,
                    HAS_CAP, ENTROPY, SMOOTH, True,
                )  # fmt: skip
            for tile in range(whole):
                highest_x, running_max, running_sum, sum_pd, sum_z, count = _add_tile(
                    row_ptr, tile * BLOCK_N, lanes, columns, cols, cap,
                    highest_x, running_max, running_sum, sum_pd, sum_z, count,
                    HAS_CAP, ENTROPY, SMOOTH, False,
                )  # fmt: skip
            if SMOOTH:
                classes = tl.sum(count, axis=0).to(tl.float32)
        if not LSE_GIVEN:
            # On a GPU nobody has looked at the targets: one that is no column has no logit.
            is_column = (target >= 0) & (target < cols)
            chosen = tl.load(row_ptr + target, mask=is_column, other=float("nan")).to(tl.float32)
            highest = tl.max(running_max, axis=0)
            max_change = running_max - highest
            rescale = tl.exp(max_change)
            sum_exp = tl.sum(rescale * running_sum, axis=0)
            lse = highest + tl.log(sum_exp)
            logprob = _logit(chosen, cap, HAS_CAP) - lse
            loss = -logprob
            if SMOOTH:
                mean = tl.sum(sum_z, axis=0) / classes - lse
                loss = (1 - label_smoothing) * loss - label_smoothing * mean
            loss += z_loss * lse * lse
            largest = tl.max(highest_x, axis=0) if HAS_CAP else highest
            tl.store(loss_ptr + row, loss)
            tl.store(logprob_ptr + row, logprob)
            tl.store(correct_ptr + row, (chosen == largest).to(tl.int8))
            if HAS_LSE:
                tl.store(lse_ptr + row, lse)
            if ENTROPY:
                mean_d = tl.sum(rescale * (sum_pd + running_sum * max_change), axis=0) / sum_exp
                tl.store(entropy_ptr + row, tl.log(sum_exp) - mean_d)
        if GRADIENT:
            scale = 1.0
            if LSE_GIVEN:
                scale = tl.load(grad_scale_ptr + row)
            scale_p = scale * (1 + 2 * z_loss * lse)
            scale_target = scale * (1 - label_smoothing)
            smoothing_share = scale * label_smoothing / classes
            out_ptr = grad_ptr + row * stride_grad
            if ragged:
                _gradient_tile(
                    row_ptr, out_ptr, whole * BLOCK_N, lanes, columns, cols, target, cap,
                    lse, scale_p, scale_target, smoothing_share, HAS_CAP, SMOOTH, True,
                )  # fmt: skip
            for tile in range(whole):
                _gradient_tile(
                    row_ptr, out_ptr, (whole - 1 - tile) * BLOCK_N, lanes, columns, cols, target,
                    cap, lse, scale_p, scale_target, smoothing_share, HAS_CAP, SMOOTH, False,
                )  # fmt: skip


def cross_entropy(
    logits: Tensor,  # [rows, cols]
    target: Tensor,  # [rows] int64
    loss: Tensor,  # [rows] float32
    logprob: Tensor,  # [rows] float32
    correct: Tensor,  # [rows] bool
    *,
    ignore_index: int,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    entropy: Tensor | None = None,  # [rows] float32
    lse: Tensor | None = None,  # [rows] float32
    grad: Tensor | None = None,  # [rows, cols] in logits' dtype; may be logits
) -> None:
    """Writes loss, logprob, correct and what is given of entropy, lse, grad. Launch size: cols."""
    outputs = (loss, logprob, correct, entropy, lse, grad, None)
    _launch(logits, target, outputs, ignore_index, label_smoothing, softcap, z_loss, False)


def cross_entropy_bwd(
    logits: Tensor,  # [rows, cols]
    target: Tensor,  # [rows] int64
    lse: Tensor,  # [rows] float32, as `cross_entropy` wrote it
    grad_scale: Tensor,  # [rows] float32: a factor of each row's gradient
    grad: Tensor,  # [rows, cols] in logits' dtype; may be logits
    *,
    ignore_index: int,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> None:
    """Writes grad as `cross_entropy` would, from its lse, times grad_scale. Launch size: cols."""
    outputs = (None, None, None, None, lse, grad, grad_scale)
    _launch(logits, target, outputs, ignore_index, label_smoothing, softcap, z_loss, True)


def _launch(
    logits: Tensor,
    target: Tensor,
    outputs: tuple[Tensor | None, ...],  # loss, logprob, correct, entropy, lse, grad, grad_scale
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    lse_given: bool,
) -> None:
    rows, cols = logits.shape
    if rows == 0:
        return
    loss, logprob, correct, entropy, lse, grad, grad_scale = outputs
    strides = (logits.stride(0), 0 if grad is None else grad.stride(0))
    aligned = all(stride % _ALIGNED_STRIDE == 0 for stride in strides)
    kernel = "cross_entropy" if aligned else "cross_entropy_unaligned"
    _cross_entropy_kernel[(rows,)](
        logits,
        target,
        loss,
        logprob,
        correct,
        entropy,
        lse,
        grad,
        grad_scale,
        cols,
        *strides,
        ignore_index,
        float(label_smoothing),
        float(softcap or 1.0),
        float(z_loss),
        HAS_CAP=softcap is not None,
        SMOOTH=label_smoothing > 0,
        ENTROPY=entropy is not None,
        HAS_LSE=lse is not None,
        LSE_GIVEN=lse_given,
        GRADIENT=grad is not None,
        VECTOR=16 // logits.element_size() if aligned else 1,
        **launch.config(kernel, logits.device, logits.dtype, cols),
    )
