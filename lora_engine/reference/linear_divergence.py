"""Divergence of two linear heads' distributions."""

import math
from typing import Protocol

import torch
from torch import Tensor

from lora_engine.reference.lora_linear import lora_linear
from lora_engine.reference.numeric import upcast
from lora_engine.values import AdaptedLinear, LoraFactors


class HeadInput(Protocol):
    """A linear head and the rows it is put to."""

    @property
    def hidden(self) -> Tensor: ...  # [U, H]
    @property
    def weight(self) -> Tensor: ...  # [V, H]
    @property
    def bias(self) -> Tensor | None: ...  # [V]
    @property
    def lora(self) -> LoraFactors | None: ...
    @property
    def softcap(self) -> float | None: ...


def linear_divergence(
    student: HeadInput, teacher: HeadInput, beta: float, temperature: float
) -> Tensor:
    """[U]: KL(q, p) for beta 0, KL(p, q) for 1, else beta KL(q, m) + (1 - beta) KL(p, m).

    p is the softmax of the student's logits over the temperature, q of the teacher's, which are
    constants, and m = beta q + (1 - beta) p (arXiv:2306.13649).
    """
    log_p = (_logits(student) / temperature).log_softmax(-1)
    log_q = (_logits(teacher) / temperature).log_softmax(-1).detach()
    if beta == 0:
        return _kl(log_q, log_p)
    if beta == 1:
        return _kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _logits(head: HeadInput) -> Tensor:
    """[U, V] after the soft-cap, in float32 or more."""
    loras = () if head.lora is None else (head.lora,)
    logits = upcast(lora_linear(head.hidden, AdaptedLinear(head.weight, loras, head.bias)))
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
