"""How far two results for the same tokens are apart, next to what rounding explains.

In float32 and float64 by the root mean square of the difference. In half precision rounding may
send a token whose router scores are nearly equal to another expert, with an unrelated result: there
the median token of a stretch is compared, next to what the model's own forward loses against
float32.
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


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the difference, of theirs; infinite where a value is not finite."""
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    wide = torch.promote_types(theirs.dtype, torch.float32)
    return rms(ours.to(wide) - theirs.to(wide)) / max(rms(theirs), 1e-12)


def excess(
    ours: Tensor,  # [B, L, H], [A, B, L, H] or [L, H]
    theirs: Tensor,
    mask: Tensor | None,  # [B, L], 0 for padding, which does not count
    dtype: torch.dtype,  # what was computed in
    *,
    exact: Tensor | None = None,  # in float32, by the model's own forward
    given: Tensor | None = None,  # what `exact` was made of
    noise: float | None = None,  # without `exact`: see `noise_of`
) -> float:
    """The difference divided by what rounding may make: at most 1 if there is no other cause."""
    if not ours.isfinite().all() or ours.dtype != theirs.dtype:
        return float("inf")
    stretches = (list(_stretches(x, mask)) for x in (ours, theirs))
    if dtype not in HALF:
        ours, theirs = (torch.cat(each) if each else ours[:0] for each in stretches)
        return distance(ours, theirs) / TOLERANCE.get(dtype, 1e-9)
    if exact is None or given is None:
        pairs = zip(*stretches, strict=True)
        allowed = TOLERANCE[dtype] if noise is None else 6 * noise + torch.finfo(dtype).eps
        ratios = [typical(a - b) / (allowed * typical(b)) for a, b in pairs]
    else:
        more = (list(_stretches(x, mask)) for x in (exact, given))
        eps = torch.finfo(dtype).eps
        ratios = [
            typical(a - truth) / (3 * typical(b - truth) + eps / 4 * typical(truth - before))
            for a, b, truth, before in zip(*stretches, *more, strict=True)
        ]
    return max(ratios, default=0.0)


def noise_of(result: Tensor, exact: Tensor) -> float:
    """The relative error of a layer's own half-precision result, medians over rows."""
    return typical((result.float() - exact).flatten(0, -2)) / typical(exact.flatten(0, -2))


def typical(rows: Tensor) -> float:
    """The median over rows [R, H] of their root mean square; at least 1e-12, to divide by."""
    return max(float(rows.square().mean(1).sqrt().median()), 1e-12)


def _stretches(x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """The rows [R, H] of either half of each sequence, without padding.

    Nothing where it cannot be said which rows are padding.
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
