"""mlx as a contender on a CPU: arrays of its own, its fast functions, compiled.

Only what mlx has as a function of its own or what its documentation writes with a few: norms, the
gated activation, the loss. Copies between torch and mlx are no part of the time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.registry import EPS, Contender, Problem
from benchmarks.common.verify import upstream


def contender(name: str, problem: Problem) -> Contender | None:
    """mlx's function for a case, or None if it has none. ImportError if not installed."""
    import mlx.core as mx

    functions: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x, r, w: (mx.fast.rms_norm(x + r, w, EPS), x + r),
        "layer_norm": lambda x, w, b: mx.fast.layer_norm(x, w, b, EPS),
        "glu": lambda gate, up: gate * mx.sigmoid(gate) * up,
        "cross_entropy": _mean_loss,
        "linear_cross_entropy": lambda h, w, t: _mean_loss(h @ w.T, t),
    }
    if name not in functions:
        return None
    mx.set_default_device(mx.cpu)
    plain = functions[name]

    def outputs(*arrays: Any) -> list[Any]:
        found = plain(*arrays)
        return list(found) if isinstance(found, tuple) else [found]

    compiled = mx.compile(outputs)

    def pulled(arrays: Sequence[Any], needs: Sequence[bool], gradients: Sequence[Any]) -> list[Any]:
        """Outputs, then gradients of the arrays that need one."""
        places = [i for i, need in enumerate(needs) if need]

        def of_wanted(*wanted: Any) -> list[Any]:
            every = list(arrays)
            for place, array in zip(places, wanted, strict=True):
                every[place] = array
            return outputs(*every)

        values, found = mx.vjp(of_wanted, [arrays[i] for i in places], list(gradients))
        return [*values, *found]

    class Pulled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
            ctx.save_for_backward(*tensors)
            return tuple(map(_to_torch, compiled(*map(_to_mlx, tensors))))

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            arrays = [_to_mlx(x) for x in ctx.saved_tensors]
            needs = list(ctx.needs_input_grad)
            found = pulled(arrays, needs, [_to_mlx(g.contiguous()) for g in gradients])
            rest = iter(found[len(gradients) :])
            return tuple(_to_torch(next(rest)) if need else None for need in needs)

    def timed(inputs: Sequence[Tensor], backward: bool) -> Callable[[], object]:
        arrays = [_to_mlx(x) for x in inputs]
        if not backward:
            return lambda: mx.eval(compiled(*arrays))
        needs = [x.requires_grad for x in inputs]
        gradients = [_to_mlx(upstream(_to_torch(y))) for y in compiled(*arrays)]
        both = mx.compile(lambda given, dy: pulled(given, needs, dy))
        return lambda: mx.eval(both(arrays, gradients))

    def function(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = Pulled.apply(*tensors)
        return found[0] if len(found) == 1 else found

    return Contender(function, timed=timed)


def _mean_loss(logits: Any, target: Any) -> Any:
    import mlx.core as mx

    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    return (mx.logsumexp(logits, axis=-1) - chosen).mean()


def _to_mlx(x: Tensor) -> Any:
    import mlx.core as mx

    x = x.detach()
    if x.dtype == torch.bfloat16:
        return mx.array(x.float().numpy()).astype(mx.bfloat16)
    return mx.array(x.numpy())


def _to_torch(x: Any) -> Tensor:
    import mlx.core as mx
    import numpy as np

    if x.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(x.astype(mx.float32))).to(torch.bfloat16)
    return torch.from_numpy(np.array(x))
