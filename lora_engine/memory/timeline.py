"""What is in memory at each moment of a training run, from sizes alone.

The moments follow the code: what a half of a layer saves (ops/layer), what its backward pass makes
(the same), what the head holds (ops/head), the flat buffers (training/optimizer). A change there
is a change here; tests/memory/test_timeline.py compares with what torch's allocator counts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from lora_engine import backends
from lora_engine.memory.host_activations import LEAVING
from lora_engine.memory.policy import Place, Policy, policy_of
from lora_engine.memory.sizes import GroupSizes, ModelSizes, accumulate_bytes
from lora_engine.ops.head.head_gradients import PIECE_BYTES
from lora_engine.ops.tensors import stepped_rows

INT64 = 8
FLOAT32 = 4
ADAMW_8BIT_BLOCK = 256
HOST_PIECE = 2**22  # values of a state on the host that an update sees at once, on a GPU
_NONE = policy_of("none")


@dataclass(frozen=True)
class Load:
    """What a step is given, and how it is carried out.

    rows: T, tokens of the micro-batch. targets: U, those that are supervised. optimizer,
    layerwise_update: as `train` has them. masters: whether weights of 16 bits that are trained have
    float32 copies. offload: where the inputs of what runs again are. host_states: whether the
    optimiser's state is on the host. device: where it
    runs. cached: tokens whose keys and values are kept while the model writes samples or rollouts.
    """

    rows: int
    targets: int
    policy: Policy = _NONE
    optimizer: str = "adamw"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cached: int = 0
    layerwise_update: bool = False
    masters: bool = True
    offload: Place | None = None
    host_states: bool = False

    @property
    def offloaded(self) -> bool:
        """Whether the inputs of what runs again are in other memory than the device's."""
        on_host = self.offload == "host" and backends.has_own_memory(self.device)
        return self.offload == "disk" or on_host

    @property
    def states_elsewhere(self) -> bool:
        """Whether the optimiser's state is in other memory than the device's."""
        return self.host_states and backends.has_own_memory(self.device)


class Moment(NamedTuple):
    """A moment's name, and the bytes alive by part."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def peak(moments: Iterator[Moment] | list[Moment]) -> Moment:
    """The moment with the most bytes."""
    return max(moments, key=lambda moment: moment.total)


def timeline(sizes: ModelSizes, load: Load) -> list[Moment]:
    """The moments of a run at which memory is high, in the order that they come."""
    return list(_Step(sizes, load).moments())


def held(
    sizes: ModelSizes, optimizer: str, *, layerwise_update: bool = False, masters: bool = True
) -> dict[str, int]:
    """Bytes that are alive from the first step to the last, by part."""
    values = sizes.adapter_values + sizes.trained_values
    # The weights of trained float32 tensors are views of the flat buffer; others have a master.
    is_view = sizes.dtype == torch.float32 or not masters
    item = FLOAT32 if masters else sizes.dtype.itemsize
    blocks = -(-values // ADAMW_8BIT_BLOCK)
    moments = {
        "adamw": 2 * FLOAT32 * values,
        "adamw_8bit": 2 * (values + FLOAT32 * blocks),
        "lion": FLOAT32 * values,
        "adafactor": FLOAT32 * sizes.factored_values,
    }
    return {
        "weights": sizes.weight_bytes - (item * sizes.trained_values if is_view else 0),
        "trained": item * values,
        "gradients": 0 if layerwise_update else FLOAT32 * values,
        "optimiser": moments[optimizer],
    }


class _Step:
    def __init__(self, sizes: ModelSizes, load: Load) -> None:
        self.sizes, self.load = sizes, load
        self.item, self.sum_item = sizes.dtype.itemsize, accumulate_bytes(sizes.dtype)
        kept = held(
            sizes,
            load.optimizer,
            layerwise_update=load.layerwise_update,
            masters=load.masters,
        )
        self.base = Counter(kept)
        if load.states_elsewhere:  # two slots
            values = max(1, sizes.adapter_values + sizes.trained_values)
            self.base["optimiser"] = kept["optimiser"] * min(values, 2 * HOST_PIECE) // values
        self.base["batch"] = self._batch()
        if load.offload == "host" and load.offloaded:  # two leave, or one comes back
            self.base["offload"] = LEAVING * self.row(load.rows, sizes.hidden)
        if sizes.packed:
            self.base["decoded"] = self._decoded()

    def moments(self) -> Iterator[Moment]:
        sizes, load = self.sizes, self.load
        rows, targets = load.rows, load.targets
        kept = [self._kept(index) for index in range(sizes.layers)]
        first = self.row(rows, sizes.hidden)  # the embedding's result
        if load.offloaded and load.policy.covers(0):
            first = 0
        activations = first + sum(kept)
        yield self._moment("forward", activations=activations, working=self._forward_work())
        yield self._moment("head", activations=activations, head=self._head())
        gradient = self._head_gradients()
        of_head = max(2 * gradient, self._arriving(gradient))
        d_hidden = 2 * self.row(targets, sizes.hidden)
        if of_head:
            yield self._moment("head, backward", activations=activations, head=of_head + d_hidden)
        arrived = 0 if load.layerwise_update else gradient
        values = sizes.adapter_values * FLOAT32 // sizes.layers
        trained = self._arriving_whole()
        for index in reversed(range(sizes.layers)):
            activations -= kept[index]
            last = index == sizes.layers - 1
            yield self._moment(
                f"layer {index}, backward",
                activations=activations + kept[index],
                working=self._backward_work(index, last=last) + trained,
                head=arrived,
                arriving=values * (sizes.layers - index),
            )
        yield self._moment("optimiser")
        yield self._moment("evaluation", working=self._forward_work(), head=self._head(train=False))
        yield self._moment("generation", cache=self._cache())
        if not backends.has_own_memory(load.device):  # on a GPU the copies are in the host's memory
            copies = self.base["trained"] + self.base["optimiser"]
            yield self._moment("checkpoint", copies=copies)

    def _moment(self, name: str, **more: int) -> Moment:
        return Moment(name, dict(self.base + Counter(more)))

    def row(self, rows: int, columns: int) -> int:
        """Bytes of [rows, columns], memory of whole steps of rows."""
        return stepped_rows(rows, columns * self.item) * columns * self.item

    def sums(self, rows: int, columns: int = 1) -> int:
        return rows * columns * self.sum_item

    def _batch(self) -> int:
        """Token ids, positions, targets; cosine and sine as the model makes and attention reads."""
        sizes, load = self.sizes, self.load
        tables = 2 * load.rows * sizes.head_dim * self.item
        if self.item != self.sum_item:
            tables += 2 * self.sums(load.rows, sizes.head_dim)
        return INT64 * (2 * load.rows + 2 * load.targets) + tables

    def _cache(self) -> int:
        """Keys and values, and logits of a step of generation."""
        sizes = self.sizes
        keys = sizes.qkv.outputs - sizes.output.inputs  # and values
        return self.load.cached * keys * sizes.layers * self.item

    def _decoded(self) -> int:
        """The scratch of decoded weights: the largest operand of a group."""
        return self.item * max(
            max(g.outputs * (g.inputs + g.rank), (g.outputs + g.rank) * g.inputs)
            for g in self.sizes.groups
        )

    # What a layer keeps.

    def _attention_saved(self, rows: int) -> int:
        """Of the attention half, beside its input."""
        sizes = self.sizes
        qkv = self.row(rows, sizes.qkv.outputs)
        lse = self.sums(rows, sizes.heads)
        if not sizes.fused:
            normed = self.row(rows, sizes.hidden)
            return normed + self.sums(rows) + qkv + self.row(rows, sizes.output.inputs) + lse
        s = rows * sizes.qkv.rank * self.item
        return self.sums(rows) + s + qkv + self._attention_output(rows)

    def _attention_output(self, rows: int) -> int:
        """Attention's output with S behind it, and its log-sum-exp."""
        sizes = self.sizes
        lse = self.sums(rows, sizes.heads)
        return self.row(rows, sizes.output.inputs + sizes.output.rank) + lse

    def _mlp_saved(self, rows: int) -> int:
        """Of the MLP half, beside its input."""
        sizes = self.sizes
        gate_up = self.row(rows, sizes.gate_up.outputs)
        if not sizes.fused:
            normed, h = self.row(rows, sizes.hidden), self.row(rows, sizes.inner)
            return normed + self.sums(rows) + gate_up + h
        s = rows * (sizes.gate_up.rank + sizes.down.rank) * self.item
        return self.sums(rows) + s + gate_up

    def _mlp_rows(self, index: int) -> int:
        """The last layer's MLP runs on the rows that have a target alone."""
        last = index == self.sizes.layers - 1 and self.sizes.fused
        return self.load.targets if last else self.load.rows

    def _kept(self, index: int) -> int:
        """What is kept of a layer until its backward pass, its output included, not its input."""
        rows, fed, hidden = self.load.rows, self._mlp_rows(index), self.sizes.hidden
        policy = self.load.policy
        result = self.row(fed, hidden)
        if self.load.offloaded and index + 1 < self.sizes.layers and policy.covers(index + 1):
            result = 0  # the next layer's input
        middle = self.row(fed, hidden)
        if not policy.covers(index):
            return self._attention_saved(rows) + middle + self._mlp_saved(fed) + result
        if policy.keeps == "inputs_of_halves":
            return (0 if self.load.offloaded else self.row(rows, hidden)) + result
        if policy.keeps == "input_and_attention":
            return self._attention_output(rows) + result
        return result

    # What is made beside it.

    def _forward_work(self) -> int:
        """The most that a half makes in its forward pass and gives up at its end."""
        sizes, rows = self.sizes, self.load.rows
        normed = self.row(rows, sizes.hidden + sizes.gate_up.rank)
        policy = self.load.policy
        tile = min(rows, policy.tile or rows)
        activated = self.row(tile, sizes.inner + sizes.down.rank)
        dropped = self.row(tile, sizes.inner) if sizes.dropout else 0
        more = 0
        if policy.covers(0):  # what the layer then lets go
            more = self._mlp_saved(tile)
            if policy.tile:  # the tiles' results, until they are one; attention's as well
                more = max(more + self.row(rows, sizes.hidden), self._attention_saved(rows))
            if policy.keeps == "input":
                more += self._attention_saved(rows)
        return normed + activated + dropped + more

    def _backward_work(self, index: int, *, last: bool) -> int:
        """The most that a layer's backward pass has beside what was kept."""
        rows, fed = self.load.rows, self._mlp_rows(index)
        policy, hidden = self.load.policy, self.sizes.hidden
        tile = min(fed, policy.tile or fed)
        mlp, attention = self._mlp_work(tile, last=last), self._attention_work(rows, last=last)
        if not policy.covers(index):
            # The MLP's saved tensors are gone when the attention half runs.
            gone = self._mlp_saved(fed) + (self.row(fed, hidden) if not last else 0)
            return max(mlp, attention - gone)
        saved, attended = self._mlp_saved(tile), self._attention_saved(rows)
        if policy.tile:  # the gradients of the half's output and of the tiles
            saved += 2 * self.row(fed, hidden)
        if policy.keeps == "inputs_of_halves":
            return max(saved + mlp, attended + attention - self.row(fed, hidden))
        middle = self.row(fed, hidden)
        if policy.keeps == "input_and_attention":
            attended -= self._attention_output(rows)
        running = attended + middle
        return running + max(saved + mlp, attention - middle)

    def _mlp_work(self, rows: int, *, last: bool) -> int:
        sizes = self.sizes
        dy = self.row(rows, sizes.hidden + sizes.down.rank)
        if last:  # the norm's gradient has no padding columns: it is copied
            dy += self.row(rows, sizes.hidden)
        dh = self.row(rows, sizes.inner)
        parts = self.row(rows, sizes.gate_up.outputs + sizes.gate_up.rank)
        scaled = rows * sizes.gate_up.rank * self.item
        dx = self.row(rows, sizes.hidden) + self.row(rows, sizes.hidden + sizes.output.rank)
        if not sizes.fused:
            return self._mlp_work_apart(rows)
        dropped = self._dropped(rows, sizes.down) if sizes.dropout else 0
        late = max(dx, self._dropped(rows, sizes.gate_up)) if sizes.dropout else dx
        return dy + parts + scaled + max(dh + dropped, late)

    def _attention_work(self, rows: int, *, last: bool) -> int:
        sizes = self.sizes
        dy = self.row(rows, sizes.hidden + sizes.output.rank)
        if last:
            dy += self.row(rows, sizes.hidden)
        d_out = self.row(rows, sizes.output.inputs)
        parts = self.row(rows, sizes.qkv.outputs + sizes.qkv.rank)
        scaled = rows * sizes.qkv.rank * self.item
        dx = self.row(rows, sizes.hidden) + self.row(rows, sizes.hidden + sizes.down.rank)
        normed = self.row(rows, sizes.qkv.outputs) if sizes.head_norms else 0
        delta = self.sums(rows, sizes.heads) if backends.has_own_memory(self.load.device) else 0
        dropped = self._dropped(rows, sizes.output) if sizes.dropout else 0
        return dy + parts + max(d_out + max(normed + delta, dropped), scaled + dx)

    def _dropped(self, rows: int, group: GroupSizes) -> int:
        """The masked input of a product, or its masked term beside the result."""
        return 2 * self.row(rows, group.inputs)

    def _mlp_work_apart(self, rows: int) -> int:
        """Of halves run by their modules: the residual's gradient and dy, dh, dgate and dup."""
        sizes = self.sizes
        wide = self.row(rows, sizes.inner) + self.row(rows, sizes.gate_up.outputs)
        return 2 * self.row(rows, sizes.hidden) + wide

    def _arriving_whole(self) -> int:
        """The largest gradient of a trained weight before it is added to the flat buffer."""
        if self.sizes.fused:
            return 0
        return self._arriving(max(g.outputs * g.inputs for g in self.sizes.groups) * self.item)

    def _arriving(self, gradient: int) -> int:
        """A gradient while it is added to the float32 buffer: a CPU casts one of 16 bits first."""
        if self.item == self.sum_item or backends.has_own_memory(self.load.device):
            return gradient
        return gradient + gradient * self.sum_item // self.item

    # The head.

    def _head_gradients(self) -> int:
        sizes = self.sizes
        return sizes.classes * sizes.hidden * self.item if sizes.head else 0

    def _head(self, *, train: bool = True) -> int:
        """The final norm's rows, a chunk of logits, and gradients that the forward pass makes."""
        sizes, load = self.sizes, self.load
        targets = load.targets
        chunk = backends.chunk_rows(load.device, sizes.dtype, targets, sizes.classes)
        logits = min(chunk, targets) * (-(-sizes.classes // 16) * 16) * self.item
        normed = self.row(targets, sizes.hidden) + self.sums(targets, 5)
        if not train:
            return normed + logits
        gradients = self._head_gradients()
        if gradients and targets > chunk:
            gradients = sizes.classes * sizes.hidden * self.sum_item
            if self.item != self.sum_item:  # a chunk's product in pieces, which a CPU casts to add
                piece = min(PIECE_BYTES, self._head_gradients())
                cast = piece * self.sum_item // self.item
                if backends.has_own_memory(load.device):
                    cast = 0
                gradients += piece + cast
        return normed + logits + targets * sizes.hidden * self.item + gradients


def offloaded_bytes(sizes: ModelSizes, load: Load) -> int:
    """Of a micro-batch, what leaves the device in the forward pass and comes back in the backward
    pass."""
    if not load.offloaded:
        return 0
    inputs = 2 if load.policy.keeps == "inputs_of_halves" else 1
    layers = sum(load.policy.covers(index) for index in range(sizes.layers))
    return layers * inputs * load.rows * sizes.hidden * sizes.dtype.itemsize


def with_rows(load: Load, rows: int) -> Load:
    """The same of another number of tokens, as many of them supervised."""
    share = load.targets / max(1, load.rows)
    return replace(load, rows=rows, targets=max(1, round(share * rows)))
