"""How much Python a decoder layer's training step takes between the launches of a GPU.

The calls of functions are counted, not time: on a GPU's path, with kernels that do nothing.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from gpu_choices import choices_of_a_gpu

import lora_engine
from lora_engine import backends
from lora_engine.data.batch import collate
from lora_engine.data.render import Example
from lora_engine.evaluation.batch_loss import batch_loss
from lora_engine.objectives.sft import SFT
from lora_engine.testing import tiny_llama, with_lora
from lora_engine.training.optimizer.flat import FlatParameters

ROOT = Path(lora_engine.__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) for folder in ("lora_engine", "kernels"))
# Of both passes through a layer with LoRA on its seven linears.
MOST_CALLS = 2600
MOST_LAUNCHES = 36


def calls_of(action: Callable[[], object]) -> int:
    """Calls of the package's functions that `action` makes, and of built-in ones by these."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += frame.f_code.co_filename.startswith(OURS)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


def costs_of(layers: int, launches: list[object]) -> tuple[int, int]:
    """Calls and launches of a micro-step of a model with so many layers, once it is warm."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "layers": layers}
    model = with_lora(tiny_llama(**sizes, dtype=torch.bfloat16), r=16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    lora_engine.accelerate(model.train())
    flat, objective = FlatParameters(model.named_parameters()), SFT()
    lengths = (9, 5)
    batch = collate([Example(list(range(3, 3 + n)), [True] * n, str(n)) for n in lengths])

    def micro_step() -> None:
        flat.zero_grad()
        loss = batch_loss(model, batch, objective)
        with flat.collecting():
            loss.total.backward()

    with choices_of_a_gpu():
        for _ in range(2):
            micro_step()
        launches.clear()
        calls = calls_of(micro_step)
    return calls, len(launches)


def test_a_layer_takes_few_calls_and_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    if not backends.triton_interpreted():
        pytest.skip("the kernels are compiled in this process")
    from lora_engine.backends.triton.relaunch import Relaunched

    launches: list[object] = []

    def launch(*args: Any, **constants: Any) -> None:
        launches.append(None)

    monkeypatch.setattr(Relaunched, "__getitem__", lambda kernel, grid: launch)
    one, three = costs_of(1, launches), costs_of(3, launches)
    calls, launched = ((more - fewer) / 2 for more, fewer in zip(three, one, strict=True))
    assert MOST_CALLS / 2 < calls <= MOST_CALLS
    assert MOST_LAUNCHES / 2 < launched <= MOST_LAUNCHES
