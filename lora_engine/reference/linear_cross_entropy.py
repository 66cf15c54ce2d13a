"""Cross-entropy of a linear head's logits, and the gradients of what the head is made of."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.reference.cross_entropy import TokenLosses, token_losses
from lora_engine.reference.lora_linear import lora_linear
from lora_engine.reference.numeric import upcast
from lora_engine.values import AdaptedLinear, LoraFactors


def linear_cross_entropy(
    hidden: Tensor,  # [U, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [U] int64
    ignore_index: int = -100,
    *,
    bias: Tensor | None = None,  # [V]
    lora: LoraFactors | None = None,  # lora_a [r, H], lora_b [V, r]
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> TokenLosses:
    """`token_losses` of `(hidden Wᵀ + scaling (hidden Aᵀ) Bᵀ + bias) / temperature`.

    The logits are rounded to hidden's dtype, as a linear layer does, before they are divided.
    """
    logits = _logits(hidden, weight, bias, lora)
    if temperature != 1:
        logits = upcast(logits) / temperature
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    return token_losses(logits, target, ignore_index, softcap=softcap, **options)


class HeadGradients(NamedTuple):
    """Gradients of a head's operands, each in its operand's shape."""

    hidden: Tensor  # [U, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]


def head_gradients(
    hidden: Tensor,  # [U, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [U] int64
    d_loss: Tensor,  # [U]: of each row's loss, as it arrives
    d_entropy: Tensor | None = None,  # [U]: of each row's entropy, likewise
    ignore_index: int = -100,
    *,
    bias: Tensor | None = None,  # [V]
    lora: LoraFactors | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> HeadGradients:
    """What autograd makes of `linear_cross_entropy`, written out; not differentiable itself.

    With z the logits X Wᵀ + s (X Aᵀ) Bᵀ + bias over the temperature T and after the soft-cap c,
    lse = logsumexp(z), p = softmax(z), h the entropy, V classes, l label smoothing:

        dz = d_loss ((1 + 2 z_loss lse) p - (1 - l) onehot(target) - l / V)
             - d_entropy p (log p + h)           a row that is ignored: 0
        dz ← dz (1 - (z / c)²) / T
        dX = dz W + dS A    dS = s dz B    dW = dzᵀ X    dbias = Σ dz
        dA = dSᵀ X          dB = s dzᵀ (X Aᵀ)
    """
    with torch.no_grad():
        x = upcast(_logits(hidden, weight, bias, lora)) / temperature
        z = x if softcap is None else softcap * torch.tanh(x / softcap)
        counts = target != ignore_index
        logp = z.log_softmax(-1)
        p, lse = logp.exp(), torch.logsumexp(z, -1, keepdim=True)
        onehot = F.one_hot(target.masked_fill(~counts, 0), z.shape[1]).to(z.dtype)
        spread = label_smoothing / z.shape[1]
        dz = (1 + 2 * z_loss * lse) * p - (1 - label_smoothing) * onehot - spread
        dz = d_loss[:, None] * dz
        if d_entropy is not None:
            entropy = -(p * logp).sum(-1, keepdim=True)
            dz = dz - d_entropy[:, None] * p * (logp + entropy)
        dz = dz * counts[:, None] / temperature
        if softcap is not None:
            dz = dz * (1 - (z / softcap).square())
        d_hidden, d_a, d_b = dz @ upcast(weight), None, None
        if lora is not None:
            a, b = upcast(lora.lora_a), upcast(lora.lora_b)
            ds = lora.scaling * dz @ b
            d_hidden = d_hidden + ds @ a
            d_a = (ds.T @ upcast(hidden)).to(lora.lora_a.dtype)
            d_b = (lora.scaling * dz.T @ (upcast(hidden) @ a.T)).to(lora.lora_b.dtype)
        d_weight, d_bias = dz.T @ upcast(hidden), dz.sum(0)
        kind = hidden.dtype
        return HeadGradients(
            hidden=d_hidden.to(kind),
            weight=d_weight.to(kind),
            bias=d_bias.to(kind),
            lora_a=d_a,
            lora_b=d_b,
        )


def _logits(
    hidden: Tensor,  # [U, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    lora: LoraFactors | None,
) -> Tensor:
    """[U, V] in hidden's dtype."""
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    return lora_linear(hidden, AdaptedLinear(weight, () if lora is None else (lora,), bias))
