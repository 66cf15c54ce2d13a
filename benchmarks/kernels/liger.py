"""Liger-Kernel as a contender: its functions on the inputs of our cases.

Called as its modules for transformers call them. Some write over what they are given: rope over q
and k and their gradients, glu's backward pass over gate and up, cross_entropy over the logits. Such
a contender is timed on inputs of its own, which are made anew before every call. rms_norm is told
not to write its gradient over dy; it moves as many bytes either way.
"""

from collections.abc import Callable

from torch import Tensor

from benchmarks.common.registry import EPS, Contender, Problem


def contender(name: str, problem: Problem) -> Contender | None:
    """Liger-Kernel's function for a case, or None if it has none. ImportError if not installed."""
    found = CONTENDERS.get(name)
    return None if found is None else found(problem)


def _rms_norm(problem: Problem) -> Contender:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as AddRMSNorm

    return Contender(lambda x, r, w: AddRMSNorm.apply(x, r, w, EPS, 0.0, "llama", False))


def _layer_norm(problem: Problem) -> Contender | None:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction as LayerNorm

    if len(problem.inputs) != 3:
        return None
    return Contender(lambda x, w, b: LayerNorm.apply(x, w, b, EPS))


def _rope(problem: Problem) -> Contender | None:
    """q and k [tokens, heads, D] are what its [batch, heads, tokens, D] looks like in memory."""
    from liger_kernel.ops.rope import LigerRopeFunction as Rope

    if len(problem.inputs) != 4:
        return None

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        heads = (x[None].transpose(1, 2) for x in (q, k))
        return tuple(x.transpose(1, 2)[0] for x in Rope.apply(*heads, cos[None], sin[None]))

    return Contender(rope, in_place=True)


def _glu(problem: Problem) -> Contender:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction as SwiGLU

    return Contender(lambda gate, up: SwiGLU.apply(gate, up), in_place=True)


def _geglu(problem: Problem) -> Contender:
    from liger_kernel.ops.geglu import LigerGELUMulFunction as GeGLU

    return Contender(lambda gate, up: GeGLU.apply(gate, up), in_place=True)


def _cross_entropy(problem: Problem) -> Contender:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return Contender(lambda logits, target: liger_cross_entropy(logits, target), in_place=True)


def _linear_cross_entropy(problem: Problem) -> Contender:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

    return Contender(lambda hidden, weight, target: fused(hidden, weight, target))


CONTENDERS: dict[str, Callable[[Problem], Contender | None]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "glu": _glu,
    "geglu": _geglu,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}
