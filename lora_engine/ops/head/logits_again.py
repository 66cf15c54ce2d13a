"""Gradients of a linear head's results, from logits that the backward pass recomputes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.backends.contracts import CrossEntropy
from lora_engine.ops.cross_entropy import LossOptions
from lora_engine.ops.head.head_gradients import HeadGradients
from lora_engine.ops.head.linear_head import (
    HeadParameters,
    LinearHead,
    ParameterGradients,
    WantedHeadGradients,
)
from lora_engine.ops.tensors import accumulate_dtype


@dataclass(frozen=True)
class LogitsAgain:
    """Rows whose logits are recomputed, chunk by chunk."""

    parameters: HeadParameters
    wanted: WantedHeadGradients
    scaling: float
    chunks: list[slice]
    hidden: Tensor  # [U, H]
    target: Tensor  # [U] int64
    lse: Tensor  # [U] float32

    def loss_gradients(
        self,
        d_losses: Tensor,  # [U] float32
        kernels: CrossEntropy,
        options: LossOptions,
    ) -> ParameterGradients:
        """The parameters' gradients, of the sum of the rows' losses times their `d_losses`."""

        def rewrite(z: Tensor, span: slice) -> None:
            kernels.cross_entropy_bwd(
                z, self.target[span], self.lse[span], d_losses[span], z, **options.keywords()
            )

        return self._gradients(rewrite, None)

    def entropy_gradients(
        self,
        d_entropy: Tensor,  # [U] float32
        entropy: Tensor,  # [U] float32
        options: LossOptions,
    ) -> tuple[Tensor | None, ParameterGradients]:
        """The gradients of hidden and of the parameters, of the rows' entropies.

        With p = softmax(z): d entropy / dz = -p (log p + entropy).
        """
        d_entropy = d_entropy.masked_fill(self.target == options.ignore_index, 0)

        def rewrite(z: Tensor, span: slice) -> None:
            x, cap = z.to(accumulate_dtype(z.dtype)), options.softcap
            if cap is not None:
                x = cap * torch.tanh(x / cap)
            p = torch.exp(x - self.lse[span, None])
            d = (torch.special.entr(p) - p * entropy[span, None]) * d_entropy[span, None]
            z.copy_(d if cap is None else d * (1 - (x / cap).square()))

        d_hidden = torch.empty_like(self.hidden) if self.wanted.hidden else None
        return d_hidden, self._gradients(rewrite, d_hidden)

    def _gradients(
        self, rewrite: Callable[[Tensor, slice], None], d_hidden: Tensor | None
    ) -> ParameterGradients:
        """The parameters' gradients; `d_hidden` is written unless None.

        rewrite: replaces a chunk's logits by their gradient, in place.
        """
        head = LinearHead.of(self.parameters, self.scaling)
        sums = HeadGradients(self.parameters, self.wanted, self.hidden.dtype, len(self.chunks))
        for span, h, z, s in self._logits(head):
            rewrite(z, span)
            ds = head.rank_gradient(z)
            if d_hidden is not None:
                head.hidden_gradient(z, ds, d_hidden[span])
            sums.add(z, h, s, ds, self.scaling)
        return sums.finish()

    def _logits(self, head: LinearHead) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """For each chunk: its span, its hidden rows h, their logits, and h lora_aᵀ."""
        rows = max((span.stop - span.start for span in self.chunks), default=0)
        buffer = head.buffer(rows)
        for span in self.chunks:
            h, z = self.hidden[span], buffer[: span.stop - span.start]
            yield span, h, z, head.logits(h, z)
