"""How often a step calls PyTorch: between its products, host time is what these calls take.

A call is what a TorchDispatchMode sees: every call of the dispatcher below autograd, views and
allocations included. Products of matrices do not count.
"""

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import make_examples, one_batch

from lora_engine.models.attach.accelerate import accelerate
from lora_engine.objectives.sft import SFT
from lora_engine.testing import tiny_llama, with_lora
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.adamw import FlatAdamW
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.step import TrainStep

PRODUCTS = ("mm", "addmm", "addmm_")
# One adapter in each group of linears: (q, k, v), output, (gate, up), down.
ONE_EACH = ["q_proj", "o_proj", "gate_proj", "down_proj"]


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name not in PRODUCTS:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def calls(layers: int, targets: list[str] | str = "all-linear", passes: int = 1) -> Counter[str]:
    """Of the second step of a model with rank 8, over as many micro-batches as `passes`."""
    plain = tiny_llama(hidden_size=32, intermediate_size=48, layers=layers)
    model = with_lora(plain, r=8, target_modules=targets)
    accelerate(model.train())
    flat = FlatParameters(model.named_parameters())
    step = TrainStep(model, SFT(), FlatAdamW(flat, TrainConfig()))
    batches = [one_batch(make_examples(5))] * passes
    step(1, batches, 1e-3, lambda: None)
    with Calls() as counted:
        step(2, batches, 1e-3, lambda: None)
    return counted.count


def test_calls_of_a_layer() -> None:
    two, three = calls(2), calls(3)
    of_a_layer = three - two
    assert of_a_layer.total() <= 56, of_a_layer
    assert not {"mul", "mul_", "add", "add_", "cat"} & of_a_layer.keys()
    rest = two - of_a_layer - of_a_layer  # embedding, rotation, head, loss, norm, optimiser
    assert rest.total() <= 95, rest


def test_more_adapters_take_no_more_calls() -> None:
    assert calls(2) == calls(2, ONE_EACH)


@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_of_another_micro_batch_are_added_without_a_call(layers: int) -> None:
    one, two = calls(layers), calls(layers, passes=2)
    added = two - one
    assert not {"_foreach_add_", "add_", "mul_"} & added.keys()
