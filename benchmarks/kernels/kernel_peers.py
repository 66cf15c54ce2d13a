"""Other people's kernels as contenders, each called as its documentation has it.

PEFT           lora_linear: its layers, adapters in the weights' dtype, which is its fastest
bitsandbytes   blockwise_4bit: dequantize_4bit
Liger-Kernel   on a GPU: liger.py
mlx            float32 and bfloat16 arrays of its own, compiled: mlx_peer.py
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.common.registry import Contender, Problem
from benchmarks.common.verify import upstream
from benchmarks.kernels import liger, mlx_peer

SCALING = 2.0  # of the case lora_linear


def contenders(
    name: str, problem: Problem, device: torch.device
) -> Iterator[tuple[str, Contender]]:
    """What other packages have for a case, of those that are installed, by the package's name."""
    if device.type == "cuda" and _installed("liger_kernel"):
        found = liger.contender(name, problem)
        if found is not None:
            yield "liger", found
    if name == "lora_linear" and _installed("peft"):
        yield "peft", _peft(problem)
    if name == "blockwise_4bit" and _installed("bitsandbytes"):
        yield "bitsandbytes", _bitsandbytes(problem)
    if device.type == "cpu" and _installed("mlx.core"):
        mine = mlx_peer.contender(name, problem)
        if mine is not None:
            yield "mlx", mine


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _peft(problem: Problem) -> Contender:
    """Inputs are x [M, K], the weights [N, K], then A [r, K] and B [N, r] for each of them."""
    import peft

    weights, factors = _parts(problem.inputs)
    layers = []
    for weight, (lora_a, lora_b) in zip(weights, factors, strict=True):
        n, k = weight.shape
        holder = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False))
        holder.to(device=weight.device, dtype=weight.dtype)
        rank = lora_a.shape[0]
        config = peft.LoraConfig(r=rank, lora_alpha=round(SCALING * rank), target_modules=["0"])
        model = peft.get_peft_model(holder, config, autocast_adapter_dtype=False)
        layer: Any = model.base_model.model[0]
        layer.base_layer.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            for own, given in zip(pair, (lora_a, lora_b), strict=True):
                own.copy_(given)
        layers.append((layer, pair))

    def function(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        pairs = _parts((x, *tensors))[1]
        for (layer, _), factors in zip(layers, pairs, strict=True):
            names = ("lora_A.default.weight", "lora_B.default.weight")
            given = {n: t.to(x.dtype) for n, t in zip(names, factors, strict=True)}
            outputs.append(functional_call(layer, given, (x,)))
        return tuple(outputs)

    def timed(inputs: Sequence[Tensor], backward: bool) -> Callable[[], object]:
        x = inputs[0].detach().requires_grad_(backward)
        if not backward:

            def forward() -> object:
                with torch.no_grad():
                    return [layer(x) for layer, _ in layers]

            return forward
        wanted = [x, *(tensor for _, pair in layers for tensor in pair)]
        gradients = [upstream(layer(x).detach()) for layer, _ in layers]
        return lambda: torch.autograd.grad([layer(x) for layer, _ in layers], wanted, gradients)

    return Contender(function, timed=timed)


def _parts(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The weights, and each one's A and B."""
    count = (len(inputs) - 1) // 3
    rest = inputs[1 + count :]
    return list(inputs[1 : 1 + count]), list(zip(rest[::2], rest[1::2], strict=True))


def _bitsandbytes(problem: Problem) -> Contender:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes import functional
    codes, state = functional.quantize_4bit(
        problem.inputs[0].detach(), blocksize=64, quant_type="nf4", compress_statistics=True
    )

    def function(weight: Tensor) -> Tensor:
        out: Tensor = functional.dequantize_4bit(codes, state)  # it has no out= on a CPU
        return out

    return Contender(function)
