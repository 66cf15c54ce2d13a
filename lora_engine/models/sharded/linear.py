"""A linear of whose frozen weight each of several processes keeps a part."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lora_engine.ops.frozen_product import frozen_product
from lora_engine.ops.quantized_weight import QuantizedWeight
from lora_engine.ops.sharded_weight import ShardedGroup, ShardedWeight


class ShardedLinear(nn.Linear):
    """A linear whose frozen weight is gathered from all processes for each product.

    weight: a parameter without memory of its own, of which every element is the same. Of a dense
    weight it is [N, K] and NaN, so that whoever computes with it, and not with what is gathered,
    notices; of packed bits it has shape and dtype of the codes. All processes call their linears in
    the same order.
    """

    def __init__(self, sharded: ShardedWeight, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = sharded.shape
        self.dtype = sharded.dtype
        self.weight = _without_memory(sharded)
        self.register_parameter("bias", None)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self._keep(sharded)

    @property
    def sharded(self) -> ShardedWeight:
        """This process's part of the weight."""
        return self._group.weights[0]

    def dequantize(self) -> Tensor:
        """The weight [N, K], gathered and decoded, in memory of its own."""
        return _gathered(self._group).clone()

    @property
    def W_q(self) -> Tensor:
        """`weight`. PEFT asks a linear with such an attribute for `dequantize()`, as for DoRA."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] times the weight, plus the bias: [..., N], in input's dtype."""
        y = frozen_product(input, partial(_gathered, self._group))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        sharded = self.sharded
        kind = sharded.dtype if sharded.format is None else sharded.format
        return f"{super().extra_repr()}, {kind}, {sharded.kept}"

    def _keep(self, sharded: ShardedWeight) -> None:
        self._group = ShardedGroup([sharded])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ShardedLinear":
        """Moves shard and bias to another device; the weight's dtype stays."""
        device = fn(self.sharded.tail).device
        if device != self.sharded.device:
            self._keep(self.sharded.to(device))
            self.weight = _without_memory(self.sharded)
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self


def _without_memory(sharded: ShardedWeight) -> nn.Parameter:
    """One element in the place of a dense weight, or of codes as a QuantizedLinear has them."""
    if sharded.format is None:
        nan = torch.full((1, 1), torch.nan, dtype=sharded.dtype, device=sharded.device)
        return nn.Parameter(nan.expand(sharded.shape), requires_grad=False)
    codes = sharded.parts["codes"]
    shape = codes.shape if len(codes.shape) == 2 else (*codes.shape, 1)
    zero = torch.zeros((1, 1), dtype=codes.dtype, device=sharded.device)
    return nn.Parameter(zero.expand(shape), requires_grad=False)


def is_elsewhere(parameter: Tensor) -> bool:
    """Whether it is the `weight` of a ShardedLinear, or another that holds one element at most."""
    return parameter.numel() > 1 and not any(parameter.stride())


def _gathered(group: ShardedGroup) -> Tensor:
    """The one weight [N, K] of the group, dense; valid until another group's is asked for."""
    (weight,) = group.whole()
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
