"""Dropout whose mask is a function of a seed, so that no pass has to store it.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key
and a counter into four words. Every implementation of ours gives the same mask, bit for bit.
"""

import torch
from torch import Tensor

from lora_engine.reference.numeric import upcast
from lora_engine.values import WORD, Dropout

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],  # int64, 32-bit words
    key: tuple[int, int],  # 32-bit words
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words, int64 in [0, 2^32), of Philox4x32-10 for each counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _multiply(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 64-bit product, from halves whose products fit in 63 bits."""
    low, high = a * (factor & 0xFFFF), a * (factor >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & WORD


def dropout_mask(
    dropout: Dropout, substream: int, rows: int, cols: int, device: torch.device | str = "cpu"
) -> Tensor:
    """True [rows, cols] where an element is kept.

    Element (m, k) has word k mod 4 of Philox4x32-10 with the seed's low and high word as key and
    the counter (k // 4, m, substream, 0). It is kept if its word >= round(p 2^32).
    """
    groups = -(-cols // 4)
    c0 = torch.arange(groups, device=device).expand(rows, groups)
    c1 = torch.arange(rows, device=device)[:, None].expand(rows, groups)
    c2 = torch.full_like(c0, substream)
    words = philox((c0, c1, c2, torch.zeros_like(c0)), dropout.key)
    interleaved = torch.stack(words, dim=-1).reshape(rows, 4 * groups)
    return interleaved[:, :cols] >= dropout.threshold


def drop(
    x: Tensor,  # [..., K]
    dropout: Dropout,
    substream: int = 0,
) -> Tensor:
    """`mask * x / (1 - p)` in x's dtype; row m of the mask is the m-th row of x's [M, K]."""
    rows = x.reshape(-1, x.shape[-1])
    mask = dropout_mask(dropout, substream, rows.shape[0], rows.shape[1], x.device)
    scaled = upcast(rows) * dropout.scale
    return torch.where(mask, scaled, torch.zeros_like(scaled)).to(x.dtype).view(x.shape)
