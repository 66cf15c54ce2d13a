"""A group of linears looks again at its layers where something about them may have changed."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_engine
from lora_engine.models.attach.attention import AttentionForward
from lora_engine.models.attach.linear_group import LinearGroup
from lora_engine.models.peft.watch import Watch
from lora_engine.testing import tiny_llama, with_lora

IDS = torch.arange(3, 43).view(2, 20)


def model_and_group(**options: Any) -> tuple[Any, Any, LinearGroup]:
    """An accelerated model, one of its LoRA layers, and the group that has this layer alone."""
    model = with_lora(tiny_llama(), target_modules=["o_proj"], **options)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["o_proj"]))
    lora_engine.accelerate(model)
    attention = model.get_base_model().model.layers[0].self_attn
    assert isinstance(attention.forward, AttentionForward)
    return model, attention.o_proj, attention.forward.output


def looks(model: Any, group: LinearGroup, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the group looks at its layers in one call of the model."""
    count = 0
    look = LinearGroup._look

    def counting(self: LinearGroup, lora: Any) -> bool:
        nonlocal count
        count += self is group
        return look(self, lora)

    with monkeypatch.context() as patch:
        patch.setattr(LinearGroup, "_look", counting)
        with torch.no_grad():
            model(input_ids=IDS)
    return count


def own_dictionary(layer: Any) -> None:
    layer.lora_A.__dict__ = dict(vars(layer.lora_A))


def own_parameters(layer: Any) -> None:
    factor = layer.lora_B["default"]
    factor._parameters = dict(factor._parameters)


def of_another_class(layer: Any) -> None:
    layer.lora_A["default"].__class__ = type("Other", (nn.Linear,), {})


def other_forward_of_the_class(layer: Any) -> None:
    kind = type("Other", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    layer.lora_A["default"].__class__ = kind


def tensor_in_the_place_of_a_parameter(layer: Any) -> None:
    factor = layer.lora_B["default"]
    weight = factor.weight
    del factor.weight
    vars(factor)["weight"] = weight.detach()


def list_written_into(layer: Any) -> None:
    layer.active_adapters.clear()


CHANGES: dict[str, Callable[[Any], object]] = {
    "hook": lambda layer: layer.lora_B["default"].register_forward_hook(lambda *_: None),
    "hook before": lambda layer: layer.base_layer.register_forward_pre_hook(lambda *_: None),
    "hook behind": lambda layer: layer.lora_A["default"].register_full_backward_hook(
        lambda *_: None
    ),
    "hook put there by hand": lambda layer: layer.base_layer._forward_hooks.update(
        {0: lambda *_: None}
    ),
    "forward": lambda layer: setattr(layer.base_layer, "forward", layer.base_layer.forward),
    "class": of_another_class,
    "forward of its class": other_forward_of_the_class,
    "factor": lambda layer: layer.lora_A.update(
        {"default": copy.deepcopy(layer.lora_A["default"])}
    ),
    "factors": lambda layer: setattr(layer, "lora_A", copy.copy(layer.lora_A)),
    "parameter": lambda layer: setattr(
        layer.lora_B["default"], "weight", nn.Parameter(layer.lora_B["default"].weight.detach())
    ),
    "parameters": own_parameters,
    "tensor": tensor_in_the_place_of_a_parameter,
    "shape": lambda layer: setattr(
        layer.lora_A["default"].weight, "data", torch.ones(1, layer.in_features)
    ),
    "bias": lambda layer: setattr(
        layer.lora_B["default"], "bias", nn.Parameter(torch.ones(layer.out_features))
    ),
    "bias of the base": lambda layer: setattr(
        layer.base_layer, "bias", nn.Parameter(torch.ones(layer.out_features))
    ),
    "scaling": lambda layer: layer.scaling.update(default=0.25),
    "scalings": lambda layer: setattr(layer, "scaling", {"default": 0.25}),
    "dropout": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.5)}),
    "variant": lambda layer: layer.lora_variant.update(default=object()),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "another adapter": lambda layer: layer.set_adapter("other"),
    "no adapter": list_written_into,
    "adapter deleted": lambda layer: layer.delete_adapter("default"),
    "base": lambda layer: setattr(layer, "base_layer", copy.deepcopy(layer.base_layer)),
    "base weight": lambda layer: setattr(
        layer.base_layer, "weight", nn.Parameter(layer.base_layer.weight.detach().clone(), False)
    ),
    "memory of the base weight": lambda layer: setattr(
        layer.base_layer.weight, "data", layer.base_layer.weight.detach().clone()
    ),
    "base trained": lambda layer: layer.base_layer.weight.requires_grad_(True),
    "modules": lambda layer: setattr(layer, "_modules", dict(layer._modules)),
    "dictionary": own_dictionary,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_looked_at_again(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer, group = model_and_group()
    looks(model, group, monkeypatch)
    assert looks(model, group, monkeypatch) == 0
    CHANGES[change](layer)
    assert not group._is_as_seen()


def test_of_classes_and_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _layer, group = model_and_group(lora_dropout=0.1)
    model.eval()
    looks(model, group, monkeypatch)
    assert looks(model, group, monkeypatch) == 0
    model.train()
    assert looks(model, group, monkeypatch) == 1
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert not group._is_as_seen()


def test_steps_of_training_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _layer, group = model_and_group()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    looks(model, group, monkeypatch)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert looks(model, group, monkeypatch) == 0


def test_a_copy_has_seen_nothing() -> None:
    watch = Watch()
    assert not watch.holds()
    watch.item({"a": 1}, "a")
    assert watch.holds()
    assert not copy.deepcopy(watch).holds()
    assert not copy.copy(watch).holds()
