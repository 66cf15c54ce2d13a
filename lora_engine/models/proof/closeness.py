"""How far two results for the same tokens differ, in units of what rounding explains.

In float32 and float64 the root mean square of the difference is taken. In half precision rounding
may send a token whose router scores are nearly equal to another expert, with an unrelated result:
there the median token of a part of a sequence is taken, and compared with the error of the model's
own forward against float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# The relative difference that rounding in one layer, or in the head, may make.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
HALF = (torch.float16, torch.bfloat16)


def rms(x: Tensor) -> float:
    """The root mean square; 0 of nothing."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return float(wide.square().mean().sqrt()) if x.numel() else 0.0


def distance(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of `expected`; infinite where a value is not finite."""
    if actual.shape != expected.shape or not (
        actual.isfinite().all() and expected.isfinite().all()
    ):
        return float("inf")
    wide = torch.promote_types(expected.dtype, torch.float32)
    return rms(actual.to(wide) - expected.to(wide)) / max(rms(expected), 1e-12)


def excess(
    actual: Tensor,  # [B, L, H], [A, B, L, H] or [L, H]
    expected: Tensor,
    mask: Tensor | None,  # [B, L], 0 for padding, which does not count
    dtype: torch.dtype,  # what was computed in
    *,
    exact: Tensor | None = None,  # in float32, by the model's own forward
    inputs: Tensor | None = None,  # of the forward that gave `exact`, shaped as it
    noise: float | None = None,  # without `exact`: see `noise_of`
) -> float:
    """The difference over the largest that rounding explains: above 1 there is another cause."""
    if not actual.isfinite().all() or actual.dtype != expected.dtype:
        return float("inf")
    halves = (list(_halves(x, mask)) for x in (actual, expected))
    if dtype not in HALF:
        actual, expected = (torch.cat(each) if each else actual[:0] for each in halves)
        return distance(actual, expected) / TOLERANCE.get(dtype, 1e-9)
    if exact is None or inputs is None:
        pairs = zip(*halves, strict=True)
        allowed = TOLERANCE[dtype] if noise is None else 6 * noise + torch.finfo(dtype).eps
        ratios = [typical(a - b) / (allowed * typical(b)) for a, b in pairs]
    else:
        more = (list(_halves(x, mask)) for x in (exact, inputs))
        eps = torch.finfo(dtype).eps
        ratios = [
            typical(a - truth) / (3 * typical(b - truth) + eps / 4 * typical(truth - before))
            for a, b, truth, before in zip(*halves, *more, strict=True)
        ]
    return max(ratios, default=0.0)


def noise_of(result: Tensor, exact: Tensor) -> float:
    """The relative error of a layer's own half-precision result, medians over rows."""
    return typical((result.float() - exact).flatten(0, -2)) / typical(exact.flatten(0, -2))


def typical(rows: Tensor) -> float:
    """The median over rows [R, H] of their root mean square; at least 1e-12, as a divisor."""
    return max(float(rows.square().mean(1).sqrt().median()), 1e-12)


def _halves(x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """The rows [R, H] of the first and of the second half of each sequence, without padding.

    Nothing where x is not shaped as the mask, so that its padding is not known.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        mask = x.new_ones(x.shape[-3:-1] if x.dim() > 2 else (1, x.shape[0]))
        x = x if x.dim() > 2 else x[None]
    if x.dim() == 4 and x.shape[1:3] == mask.shape:
        x = x.movedim(0, 2).flatten(2)
    if x.shape[:2] != mask.shape:
        return
    for sequence, real in zip(x.flatten(2), mask.bool(), strict=True):
        rows = sequence[real]
        yield from (part for part in rows.chunk(2) if len(part))


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """What activations are rounded to: PEFT keeps adapters in float32 over a bfloat16 model."""
    dtypes = (p.dtype for p in model.parameters() if p.dtype in TOLERANCE)
    return min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
