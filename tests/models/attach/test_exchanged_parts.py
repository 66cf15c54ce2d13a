"""Parts, classes and shapes that somebody exchanges: what was put there computes."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lora_engine
from lora_engine.testing import error, tiny_llama, with_lora

IDS = torch.arange(3, 43).view(2, 20)

Alter = Callable[[Any, ExitStack], None]


class Tripled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input)


class Noise(nn.Module):
    """What stands for a dropout with no probability."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x


def scaled(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(self, *args, **kwargs)
        if isinstance(result, torch.Tensor):
            return 3 * result
        return (3 * result[0], *result[1:])

    return forward


def adapted(model: Any) -> Iterator[Any]:
    yield from (m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))


def other_factor(model: Any, undo: ExitStack) -> None:
    for layer in adapted(model):
        held = layer.lora_A["default"]
        layer.lora_A["default"] = Tripled(held.in_features, held.out_features, bias=False)
        layer.lora_A["default"].weight = held.weight


def other_class_of_a_factor(model: Any, undo: ExitStack) -> None:
    for layer in adapted(model):
        layer.lora_B["default"].__class__ = Tripled


def bias_of_a(model: Any, undo: ExitStack) -> None:
    for layer in adapted(model):
        layer.lora_A["default"].bias = nn.Parameter(torch.ones(4))


def other_dropout(model: Any, undo: ExitStack) -> None:
    for layer in adapted(model):
        layer.lora_dropout["default"] = Noise()


def other_base(model: Any, undo: ExitStack) -> None:
    for layer in adapted(model):
        held = layer.base_layer
        layer.base_layer = Tripled(held.in_features, held.out_features, bias=False)
        layer.base_layer.weight = held.weight


def other_class(path: str) -> Alter:
    def alter(model: Any, undo: ExitStack) -> None:
        module = model.get_base_model().get_submodule(path)
        own = type(module)
        module.__class__ = type(own.__name__, (own,), {"forward": scaled(own.forward)})

    alter.__name__ = f"other_class_of_{path.rpartition('.')[2]}"
    return alter


def forward_of_the_class(path: str) -> Alter:
    def alter(model: Any, undo: ExitStack) -> None:
        owner: Any = type(model.get_base_model().get_submodule(path))
        undo.callback(setattr, owner, "forward", owner.forward)
        owner.forward = scaled(owner.forward)

    alter.__name__ = f"forward_of_the_class_of_{path.rpartition('.')[2]}"
    return alter


INSIDE = [other_factor, other_class_of_a_factor, bias_of_a, other_dropout, other_base]
AROUND = [
    other_class("model.layers.0"),
    other_class("model.layers.1.self_attn"),
    other_class("model.layers.1.mlp"),
    other_class("model.layers.1.post_attention_layernorm"),
    other_class("model.layers.1.mlp.down_proj"),
    other_class("lm_head"),
    forward_of_the_class("model.layers.1.mlp"),
    forward_of_the_class("model.layers.1.mlp.down_proj"),
    forward_of_the_class("model.layers.1.mlp.down_proj.base_layer"),
]


def results(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient of a layer before all that is exchanged."""
    model.zero_grad()
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    first = model.get_base_model().model.layers[0].self_attn.v_proj
    gradient: torch.Tensor = first.lora_B["default"].weight.grad
    return loss.detach(), gradient


def plain_model(**options: Any) -> Any:
    model = with_lora(tiny_llama(initializer_range=0.2), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("alter", [*INSIDE, *AROUND], ids=lambda alter: alter.__name__)
def test_what_is_exchanged_after_accelerate_computes(alter: Alter) -> None:
    plain = plain_model()
    ours = copy.deepcopy(plain)
    lora_engine.accelerate(ours)
    unaltered = results(plain)[0]
    assert error(results(ours)[0], unaltered) < 1e-5
    with ExitStack() as undo:
        alter(plain, undo)
        if not alter.__name__.startswith("forward_of_the_class"):
            alter(ours, undo)
        expected = results(plain)
        assert error(unaltered, expected[0]) > 1e-3
        loss, gradient = results(ours)
        assert error(loss, expected[0]) < 1e-4
        assert error(gradient, expected[1]) < 1e-3


@pytest.mark.parametrize("alter", [other_factor, other_dropout], ids=lambda alter: alter.__name__)
def test_adapters_that_are_not_as_peft_makes_them_are_left(alter: Alter) -> None:
    """At B = 0 and in half precision no try shows what they compute."""
    model = with_lora(tiny_llama(dtype=torch.bfloat16))
    for layer in adapted(model):
        nn.init.zeros_(layer.lora_B["default"].weight)
    alter(model, ExitStack())
    left = lora_engine.accelerate(model).left
    assert left and all("of default is" in entry.detail for entry in left)


def test_a_forward_that_is_not_peft_s_is_left() -> None:
    class Mine(peft.tuners.lora.Linear):
        forward = scaled(peft.tuners.lora.Linear.forward)

    model = with_lora(tiny_llama())
    for layer in adapted(model):
        layer.__class__ = Mine
    left = lora_engine.accelerate(model).left
    assert left and all(entry.detail == "the forward of Mine is not PEFT's" for entry in left)


@pytest.mark.parametrize("rank", [1, 3, 9])
@pytest.mark.parametrize("exchange", ["data", "swap"])
def test_a_parameter_may_be_given_another_rank(rank: int, exchange: str) -> None:
    plain = plain_model()
    ours = copy.deepcopy(plain)
    lora_engine.accelerate(ours)
    results(ours)
    for model in (plain, ours):
        model.zero_grad()
        torch.manual_seed(1)
        for layer in adapted(model):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            new_a, new_b = torch.randn(rank, a.shape[1]), torch.randn(b.shape[0], rank)
            if exchange == "data":
                a.data, b.data = new_a, new_b
            else:
                torch.utils.swap_tensors(a, nn.Parameter(new_a))
                torch.utils.swap_tensors(b, nn.Parameter(new_b))
    for mine, theirs in zip(results(ours), results(plain), strict=True):
        assert error(mine, theirs) < 1e-3


def probability(model: Any, names: str, p: float) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and names in name:
            module.p = p


def test_each_adapter_has_its_own_dropout() -> None:
    """Where only a layer whose B is zero drops anything, nothing of it is seen in the loss."""
    model = plain_model(lora_dropout=0.5)
    lora_engine.accelerate(model)
    probability(model, "", 0.0)
    expected = model(input_ids=IDS, labels=IDS).loss
    probability(model, "v_proj", 0.5)
    assert error(model(input_ids=IDS, labels=IDS).loss, expected) > 1e-3
    for layer in model.get_base_model().model.layers:
        nn.init.zeros_(layer.self_attn.v_proj.lora_B["default"].weight)
    dropped = model(input_ids=IDS, labels=IDS).loss
    probability(model, "", 0.0)
    assert error(dropped, model(input_ids=IDS, labels=IDS).loss) < 1e-5


def test_everything_may_be_dropped() -> None:
    model = plain_model(lora_dropout=1.0)
    lora_engine.accelerate(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    with model.disable_adapter():
        assert error(loss, model(input_ids=IDS, labels=IDS).loss) < 1e-5


class Counted(nn.Module):
    """A parametrization that does something whenever its weight is asked for, as spectral_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return 3 * weight


@pytest.mark.parametrize("parametrized_first", [True, False])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base_layer"])
def test_a_parametrized_weight_is_asked_for_as_often_as_by_peft(
    part: str, parametrized_first: bool
) -> None:
    plain = with_lora(tiny_llama(), init_lora_weights=False)
    ours = copy.deepcopy(plain)

    def parametrize_one(model: Any) -> Counted:
        layer = next(adapted(model))
        held = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
        counted = Counted()
        parametrize.register_parametrization(held, "weight", counted)
        return counted

    if parametrized_first:
        counts = [parametrize_one(model) for model in (plain, ours)]
        lora_engine.accelerate(ours)
    else:
        lora_engine.accelerate(ours)
        counts = [parametrize_one(model) for model in (plain, ours)]
    before = [counted.asked for counted in counts]
    losses = [model.train()(input_ids=IDS, labels=IDS).loss for model in (plain, ours)]
    assert error(losses[1], losses[0]) < 1e-5
    theirs, mine = (c.asked - start for c, start in zip(counts, before, strict=True))
    assert theirs == mine > 0
