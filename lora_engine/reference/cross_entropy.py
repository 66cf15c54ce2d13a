"""Softmax cross-entropy of rows of logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine.reference.numeric import upcast


class TokenLosses(NamedTuple):
    """What there is to say about each row of logits; 0 and False where it is ignored."""

    loss: Tensor  # [U] float32
    logprob: Tensor  # [U] float32: log-probability of the target
    correct: Tensor  # [U] bool: whether the target has the largest logit
    entropy: Tensor  # [U] float32: of the softmax, in nats
    mean_logit: Tensor  # [U] float32: the mean of z; detached


def token_losses(
    logits: Tensor,  # [U, V]
    target: Tensor,  # [U] int64
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> TokenLosses:
    """Cross-entropy of each row, with z = softcap * tanh(logits / softcap) where there is one.

    loss = logsumexp(z) - (1 - label_smoothing) z[target] - label_smoothing mean(z)
    + z_loss logsumexp(z)^2. Label smoothing as in arXiv:1512.00567 and F.cross_entropy, z-loss as
    in arXiv:2204.02311, the soft-cap as in arXiv:2408.00118. A column of -inf is no class: results
    are those of the row without it. (F.cross_entropy's smoothed loss is infinite there.)
    """
    ignored = target == ignore_index
    x = upcast(logits)
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    index = target.masked_fill(ignored, 0)[:, None]
    lse = torch.logsumexp(z, dim=-1)
    logprob = z.gather(-1, index)[:, 0] - lse
    loss = -logprob
    if label_smoothing:
        absent = z == -torch.inf
        mean = (z - lse[:, None]).masked_fill(absent, 0).sum(-1) / (~absent).sum(-1)
        loss = (1 - label_smoothing) * loss - label_smoothing * mean
    loss = loss + z_loss * lse.square()
    correct = x.gather(-1, index)[:, 0] == x.amax(-1)
    entropy = lse - (z.softmax(-1) * z.masked_fill(z == -torch.inf, 0)).sum(-1)
    return TokenLosses(
        loss=loss.masked_fill(ignored, 0),
        logprob=logprob.masked_fill(ignored, 0),
        correct=correct & ~ignored,
        entropy=entropy.masked_fill(ignored, 0),
        mean_logit=z.detach().mean(-1).masked_fill(ignored, 0),
    )


def cross_entropy(
    logits: Tensor,  # [U, V]
    target: Tensor,  # [U] int64
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """`token_losses(...).loss`: [U] float32, 0 for ignored rows."""
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    return token_losses(logits, target, ignore_index, softcap=softcap, **options).loss
