"""benchmarks/drop_in/accelerate_cost.py measures attaching and what a step looks at."""

from typing import Any

import pytest
import torch

import lora_engine
from benchmarks.drop_in import accelerate_cost
from lora_engine.models.attach.linear_group import LinearGroup
from lora_engine.ops.lora.group import LoraGroup
from lora_engine.testing import tiny_llama, with_lora


def test_a_model_is_attached_twice_and_left_restored() -> None:
    model = with_lora(tiny_llama())
    found = accelerate_cost.attach_seconds(model)
    assert list(found) == ["first", "second"]
    assert all(seconds > 0 for each in found.values() for seconds in each.values())
    assert not any("forward" in vars(module) for module in model.modules())


def test_looking_and_copying_are_parts_of_the_step() -> None:
    model: Any = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    methods = LinearGroup.ready, LoraGroup.fill, LoraGroup.fill_again
    ids = torch.arange(3, 43).view(2, 20)
    shares = accelerate_cost.step_shares(model, {"input_ids": ids, "labels": ids}, steps=3)
    assert (LinearGroup.ready, LoraGroup.fill, LoraGroup.fill_again) == methods
    assert 0 < shares["look"] + shares["copy"] < shares["step"]
    assert min(shares["look"], shares["copy"]) > 0
    assert max(abs(shares[clock].share) for clock in ("wall", "cpu")) < 1


def test_cost_is_a_share_of_a_step_without_what_is_far_off() -> None:
    pairs = [(10.0, 9.0), (10.0, 9.5)] * 9 + [(10.0, 99.0), (99.0, 9.0)]
    cost = accelerate_cost.cost(pairs)
    assert cost.share == pytest.approx(0.075)
    assert cost.error == pytest.approx(0.025 / 16**0.5, rel=0.1)


def test_what_is_remembered_is_neither_looked_at_nor_copied() -> None:
    model: Any = with_lora(tiny_llama(), init_lora_weights=False)
    lora_engine.accelerate(model)
    ids = torch.arange(3, 43).view(2, 20)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids).logits
        return found

    remembering = accelerate_cost.Remembering()
    first = logits()
    with remembering():
        logits()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(2)
    with remembering():
        assert torch.equal(logits(), first)
    assert not torch.allclose(logits(), first)
