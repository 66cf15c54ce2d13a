"""GGUF's Q4_K, Q5_K and Q6_K, their codes searched for the least squared error, in float32.

What the bytes of a block of 256 values mean is in `quantization/gguf.py`. First every run of a
block gets, by itself, the scale (and minimum) of least error: codes rounded by several tentative
scales, and for each the least-squares solution. Then the block's d and m are chosen for the largest
of these; each run's integers s and t are searched around their rounded values, and d and m solved
again for what was found, as long as that lowers the error.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Bits of a code.
BITS = {"Q4_K": 4, "Q5_K": 5, "Q6_K": 6}
BLOCK = 256
_TENTATIVE = [k / 8 for k in range(-8, 9)]  # what is added to the largest code
_ROUNDS = 3  # of solving d and m again
_LARGEST_HALF = 65504.0


def quantize_k(
    w: Tensor,  # [N, K], K a multiple of 256; finite, within float16's values
    kind: str,  # "Q4_K", "Q5_K" or "Q6_K"
) -> Tensor:  # [N, bytes of a row] uint8
    """The rows' blocks."""
    blocks = w.float().reshape(-1, BLOCK)
    packed = _signed_blocks(blocks) if kind == "Q6_K" else _affine_blocks(blocks, BITS[kind])
    return packed.reshape(w.shape[0], w.shape[1] // BLOCK * packed.shape[1])


class _Block(NamedTuple):
    """Blocks of runs: value i of run j is d s_j q_i - m t_j; of Q6_K m and t are 0."""

    d: Tensor  # [B, 1], as float16 holds it
    m: Tensor  # [B, 1]
    s: Tensor  # [B, runs], whole numbers
    t: Tensor  # [B, runs]

    def codes(self, x: Tensor, least: int, most: int) -> Tensor:
        """q [B, runs, values of one], each the nearest to x."""
        scale = self.d * self.s
        inverse = torch.where(scale != 0, 1 / scale, 0.0)
        shift = self.m * self.t * inverse
        return torch.round(x * inverse[..., None] + shift[..., None]).clamp(least, most)

    def errors(self, x: Tensor, least: int, most: int) -> Tensor:
        """The squared error of each run, [B, runs]."""
        scale, minimum = (self.d * self.s)[..., None], (self.m * self.t)[..., None]
        return (x - (scale * self.codes(x, least, most) - minimum)).square().sum(-1)

    def where(self, better: Tensor, other: "_Block") -> "_Block":
        """The other's of the blocks [B, 1] that are better."""
        return _Block(*(torch.where(better, b, a) for a, b in zip(self, other, strict=True)))


def _affine_blocks(blocks: Tensor, bits: int) -> Tensor:
    x, most = blocks.view(-1, 8, 32), 2**bits - 1
    scale, minimum = _fit_runs(x, most)
    d, m = (_half(values.amax(1, keepdim=True) / 63) for values in (scale, minimum))
    start = _Block(d=d, m=m, s=_whole(scale, d, 0, 63), t=_whole(minimum, m, 0, 63))
    block = _refined(start, x, (0, most), (0, 63), _solve)
    return _packed_affine(block, block.codes(x, 0, most).to(torch.uint8), bits)


def _signed_blocks(blocks: Tensor) -> Tensor:
    x = blocks.view(-1, 16, 16)
    scale = _fit_signed_runs(x)
    place = scale.abs().argmax(1, keepdim=True)
    d = _half(scale.gather(1, place) / -128)
    zero = torch.zeros_like(scale)
    start = _Block(d=d, m=torch.zeros_like(d), s=_whole(scale, d, -128, 127), t=zero)
    block = _refined(start, x, (-32, 31), (-128, 127), _solve_signed)
    return _packed_signed(block, (block.codes(x, -32, 31) + 32).to(torch.uint8))


def _fit_runs(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The scale s >= 0 and the minimum m >= 0 of least error for each run as s q - m."""
    least = x.amin(-1).clamp(max=0)
    width = x.amax(-1) - least
    best = torch.full_like(least, torch.inf)
    scale, minimum = torch.zeros_like(least), -least + 0.0  # no negative zero
    total = x.sum(-1)

    def attempt(inverse: Tensor, shift: Tensor, may: Tensor) -> None:
        nonlocal best, scale, minimum
        q = torch.round(x * inverse[..., None] + shift[..., None]).clamp(0, most)
        q_sum, qq, xq = q.sum(-1), q.square().sum(-1), (x * q).sum(-1)
        determinant = 32 * qq - q_sum * q_sum
        a = (32 * xq - total * q_sum) / determinant
        b = (q_sum * xq - total * qq) / determinant
        alone = (b < 0) | ~(determinant > 0)
        a = torch.where(alone, torch.where(qq > 0, xq / qq, 0.0), a)
        b = torch.where(alone, 0.0, b)
        # The squared error without the sum of x², which all have.
        error = a * a * qq - 2 * a * xq + 2 * b * total - 2 * a * b * q_sum + 32 * b * b
        better = may & (a > 0) & (error < best)
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, a, scale), torch.where(better, b, minimum)

    for more in _TENTATIVE:
        inverse = (most + more) / width
        attempt(inverse, -least * inverse, width > 0)
    for _ in range(2):
        attempt(1 / scale, minimum / scale, scale > 0)
    return scale, minimum


def _fit_signed_runs(x: Tensor) -> Tensor:
    """The scale of least error for each run as s q; of either sign."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best, scale = torch.full_like(extreme, -1.0), torch.zeros_like(extreme)
    for end in (-32.0, 31.0):
        for more in _TENTATIVE:
            q = torch.round(x * ((end + more) / extreme)[..., None]).clamp(-32, 31)
            qq, xq = q.square().sum(-1), (x * q).sum(-1)
            gain = torch.where(qq > 0, xq * xq / qq, 0.0)
            better = (extreme != 0) & (gain > best)
            best = torch.where(better, gain, best)
            scale = torch.where(better, torch.where(qq > 0, xq / qq, 0.0), scale)
    return scale


def _refined(
    block: _Block,
    x: Tensor,
    codes: tuple[int, int],
    scales: tuple[int, int],
    solve: Callable[[_Block, Tensor, Tensor], tuple[_Block, Tensor]],
) -> _Block:
    """The block with s and t searched, and d and m solved as long as that helps.

    codes, scales: the least and the largest of q and of s. solve: gives the block with other d and
    m, and where these are determined, [B, 1].
    """
    block, error = _searched(block, x, codes, scales)
    goes_on = torch.ones_like(error, dtype=torch.bool)
    for _ in range(_ROUNDS):
        solved, determined = solve(block, x, block.codes(x, *codes))
        other, of_other = _searched(solved, x, codes, scales)
        goes_on = goes_on & determined & (of_other < error)
        block, error = block.where(goes_on, other), torch.where(goes_on, of_other, error)
    return block


def _searched(
    block: _Block, x: Tensor, codes: tuple[int, int], scales: tuple[int, int]
) -> tuple[_Block, Tensor]:
    """The block with the best of the neighbours of each s and t, and its squared error [B, 1]."""
    least, most = scales
    best = torch.full_like(block.s, torch.inf)
    found = block
    for by_s in (-1, 0, 1):
        for by_t in (-1, 0, 1) if least == 0 else (0,):
            tried = block._replace(s=block.s + by_s, t=block.t + by_t)
            fits = (tried.s >= least) & (tried.s <= most) & (tried.t >= 0) & (tried.t <= most)
            error = tried.errors(x, *codes)
            better = fits & (error < best)
            best = torch.where(better, error, best)
            found = found._replace(
                s=torch.where(better, tried.s, found.s), t=torch.where(better, tried.t, found.t)
            )
    return found, best.sum(1, keepdim=True)


def _solve(block: _Block, x: Tensor, q: Tensor) -> tuple[_Block, Tensor]:
    """d and m of least error for the codes q."""
    s, t = block.s.double(), block.t.double()

    def total(values: Tensor) -> Tensor:
        return values.sum(1, keepdim=True)

    uu, uv = total(s * s * q.square().sum(-1)), total(s * t * q.sum(-1))
    vv, ux, vx = 32 * total(t * t), total(s * (x * q).sum(-1)), total(t * x.sum(-1))
    determinant = uu * vv - uv * uv
    both, alone = determinant > 1e-9 * uu * vv, (uu > 0) & (vv == 0)
    d = torch.where(both, (ux * vv - vx * uv) / determinant, torch.where(alone, ux / uu, 0.0))
    m = torch.where(both, (ux * uv - vx * uu) / determinant, block.m.double())
    solved = block._replace(d=_half(d.float()), m=_half(m.float()))
    return solved, (both | alone) & (solved.d > 0) & (solved.m >= 0)


def _solve_signed(block: _Block, x: Tensor, q: Tensor) -> tuple[_Block, Tensor]:
    """d of least error for the codes q."""
    s = block.s.double()
    uu = (s * s * q.square().sum(-1)).sum(1, keepdim=True)
    ux = (s * (x * q).sum(-1)).sum(1, keepdim=True)
    return block._replace(d=_half(torch.where(uu > 0, ux / uu, 0.0).float())), uu > 0


def _half(values: Tensor) -> Tensor:
    return values.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float()


def _whole(values: Tensor, unit: Tensor, least: int, most: int) -> Tensor:
    """The values in whole numbers of a unit [B, 1]; 0 where that is 0."""
    return torch.where(unit != 0, torch.round(values / unit), 0.0).clamp(least, most)


def _bytes_of(half: Tensor) -> Tensor:  # [B, 1] -> [B, 2]
    return half.half().view(torch.uint8)


def _packed_affine(block: _Block, q: Tensor, bits: int) -> Tensor:
    s, t = block.s.to(torch.uint8), block.t.to(torch.uint8)
    six_bits = [
        s[:, :4] | s[:, 4:] >> 4 << 6,
        t[:, :4] | t[:, 4:] >> 4 << 6,
        s[:, 4:] & 15 | (t[:, 4:] & 15) << 4,
    ]
    fifth = []
    if bits == 5:
        places = torch.arange(8, dtype=torch.uint8, device=q.device)[:, None]
        fifth = [((q >> 4) << places).sum(1, dtype=torch.uint8)]
    lower = (q[:, ::2] & 15 | (q[:, 1::2] & 15) << 4).flatten(1)
    return torch.cat([_bytes_of(block.d), _bytes_of(block.m), *six_bits, *fifth, lower], 1)


def _packed_signed(block: _Block, q: Tensor) -> Tensor:
    halves = q.reshape(-1, 2, 4, 32)  # of 128 values, which are quarters of 32
    lower = halves[:, :, :2] & 15 | (halves[:, :, 2:] & 15) << 4
    upper = halves >> 4
    upper = upper[:, :, 0] | upper[:, :, 1] << 2 | upper[:, :, 2] << 4 | upper[:, :, 3] << 6
    s = block.s.to(torch.int8).view(torch.uint8)
    return torch.cat([lower.flatten(1), upper.flatten(1), s, _bytes_of(block.d)], 1)
