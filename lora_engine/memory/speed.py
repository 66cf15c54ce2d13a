"""How long a training step takes, from sizes and a machine's rates: a model, not a measurement."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from lora_engine.memory.sizes import ModelSizes
from lora_engine.memory.timeline import Load, held, offloaded_bytes

# Reads and writes of a trained value by the optimiser: value, gradient and moments, both ways.
_OPTIMISER_BYTES = {"adamw": 28, "adamw_8bit": 16, "lion": 20, "adafactor": 20}
# Products over those of the forward pass: those for the input's gradient, and for the weight's.
_ATTENTION_BACKWARD = 2.5
LAUNCHES_OF_A_TILE = 30  # of an MLP half, its second run and its backward pass


class Machine(NamedTuple):
    """name, and what it reaches: floating-point operations a second in products of the model's
    dtype, bytes a second, seconds for each launch of a kernel. memory: bytes; 0: not known. link,
    disk: bytes a second to the host's memory, one way, and to a file; assumed, not measured."""

    name: str
    flops: float
    bandwidth: float
    launch: float = 0.0
    memory: int = 0
    link: float = 25e9
    disk: float = 1e9


def _gpu(
    name: str, gigabytes: float, teraflops: float, terabytes: float, link: float = 32
) -> Machine:
    """Of a maker's figures in dense bfloat16: what training reaches of them on an H200. link: of
    PCIe 4.0 or 5.0 with 16 lanes, in GB/s, of which 0.8 are reached."""
    return Machine(
        name=name,
        flops=0.72 * teraflops * 1e12,
        bandwidth=0.85 * terabytes * 1e12,
        launch=4e-6,
        memory=int(gigabytes * 1e9),
        link=0.8 * link * 1e9,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("rtx-3090", 24, 71, 0.94),
        _gpu("rtx-4090", 24, 165, 1.01),
        _gpu("l4", 24, 121, 0.30),
        _gpu("rtx-5090", 32, 210, 1.79, link=64),
        _gpu("a100-40gb", 40, 312, 1.56),
        _gpu("l40s", 48, 362, 0.86),
        _gpu("a100-80gb", 80, 312, 2.04),
        _gpu("h100", 80, 989, 3.35, link=64),
        _gpu("h200", 141, 989, 4.80, link=64),
    )
}
# Of a budget in bytes alone: the first GPU that has at least as much.
BY_MEMORY = ("rtx-4090", "rtx-5090", "a100-40gb", "l40s", "h100", "h200")


def gpu_of(nbytes: int) -> Machine:
    """A usual GPU of that memory: the smallest of BY_MEMORY that has it, or the largest."""
    known = [GPUS[name] for name in BY_MEMORY]
    return next((gpu for gpu in known if gpu.memory >= nbytes), known[-1])


def measured_cpu(dtype: torch.dtype) -> Machine:
    """This processor, by products and copies of about a millisecond; the quickest counts."""
    x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    out = torch.empty(256, 1024, dtype=dtype)
    source, target = torch.ones(1 << 22), torch.ones(1 << 22)
    product = _quickest(lambda: torch.mm(x, weight.t(), out=out))
    copy = _quickest(lambda: target.copy_(source))
    flops, moved = 2 * x.numel() * weight.shape[0], 2 * source.nbytes
    return Machine("this processor", flops / product, moved / copy)


def _quickest(run: Callable[[], object]) -> float:
    times = []
    for _ in range(30):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def step_seconds(sizes: ModelSizes, load: Load, machine: Machine, length: int) -> float:
    """Of a micro-batch with an optimiser step. length: tokens of a sequence."""
    rows, targets = load.rows, load.targets
    forward = _LayerWork.of(sizes, rows, min(length, rows))
    layers = sizes.layers
    again = _again(load, forward, layers)
    backward = (
        forward.products * (1 if sizes.fused else 2) + _ATTENTION_BACKWARD * forward.attention
    )
    flops = layers * (forward.products + forward.attention + backward) + again
    flops += 2 * targets * sizes.hidden * sizes.classes * (3 if sizes.head else 2)
    traffic = layers * 3 * _traffic(sizes, rows) + again / max(1, forward.flops) * _traffic(
        sizes, rows
    )
    traffic += 2 * 3 * targets * sizes.classes * sizes.dtype.itemsize  # logits, softmax, gradient
    uses = 2 + (load.policy.every > 0) / max(1, load.policy.every)
    if sizes.packed:
        traffic += uses * layers * sum(2 * g.outputs * g.inputs for g in sizes.groups)
    values = sizes.adapter_values + sizes.trained_values
    traffic += values * _OPTIMISER_BYTES[load.optimizer]
    launches = layers * 45
    if load.policy.tile:
        launches += layers * LAUNCHES_OF_A_TILE * (-(-rows // load.policy.tile) - 1)
    seconds = flops / machine.flops + traffic / machine.bandwidth + launches * machine.launch
    elsewhere = 2 * offloaded_bytes(sizes, load)
    if load.offload == "disk":
        seconds += elsewhere / machine.disk
    else:  # copied while layers are computed: what takes longer is waited for
        seconds = max(seconds, elsewhere / machine.link)
    if load.states_elsewhere:  # there and back, while little else is to do
        kept = held(sizes, load.optimizer, masters=load.masters)["optimiser"]
        seconds += 2 * kept / machine.link
    return seconds


def tokens_per_second(sizes: ModelSizes, load: Load, machine: Machine, length: int) -> float:
    """Predicted, of a run whose micro-batches are full."""
    return load.rows / step_seconds(sizes, load, machine, length)


class _LayerWork(NamedTuple):
    """Floating-point operations of a layer's forward pass."""

    products: float
    attention: float
    output: float  # of `products`, the output projection's
    down: float

    @property
    def flops(self) -> float:
        return self.products + self.attention

    @staticmethod
    def of(sizes: ModelSizes, rows: int, length: int) -> "_LayerWork":
        each = [
            2 * rows * (g.outputs * g.inputs + g.rank * (g.outputs + g.inputs))
            for g in sizes.groups
        ]
        seen = length / 2 if not sizes.window else min(length / 2, sizes.window)
        attention = 4 * rows * seen * sizes.heads * sizes.head_dim
        return _LayerWork(
            products=float(sum(each)),
            attention=attention,
            output=float(each[1]),
            down=float(each[3]),
        )


def _again(load: Load, work: _LayerWork, layers: int) -> float:
    """Operations that are done again under the policy."""
    policy = load.policy
    if not policy.every:
        return 0.0
    count = -(-layers // policy.every)
    again = work.flops - work.down
    if policy.keeps == "inputs_of_halves":
        again -= work.output
    elif policy.keeps == "input_and_attention":
        again -= work.attention
    return count * again


def _traffic(sizes: ModelSizes, rows: int) -> int:
    """Bytes that a layer's forward pass reads and writes of activations."""
    columns = 8 * sizes.hidden + sum(2 * (g.outputs + g.inputs) for g in sizes.groups)
    return rows * columns * sizes.dtype.itemsize
