"""Steps of a small model follow PEFT's own, without dropout and with it."""

import math
import statistics
from typing import Any

import pytest
import torch

import lora_engine
from lora_engine.testing import tiny_llama, with_lora

SEEDS = 12


def losses(seed: int, *, dropout: float, accelerated: bool, steps: int = 12) -> list[float]:
    """Loss of each step, dropout included, of the same model on the same batches."""
    model: Any = with_lora(tiny_llama(layers=1), r=4, alpha=16, lora_dropout=dropout)
    if accelerated:
        lora_engine.accelerate(model, strict=True)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    ids = torch.randint(0, 97, (1, 4, 12), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(seed)
    found = []
    for step in range(steps):
        batch = ids[step % len(ids)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_without_dropout_every_step_is_peft_s() -> None:
    ours, theirs = (losses(0, dropout=0.0, accelerated=x, steps=20) for x in (True, False))
    assert theirs[-1] < 0.95 * theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_with_dropout_the_losses_are_distributed_as_peft_s() -> None:
    """Masks differ, so runs differ; their means over many seeds agree within the noise."""
    runs = {
        accelerated: [losses(s, dropout=0.1, accelerated=accelerated) for s in range(SEEDS)]
        for accelerated in (True, False)
    }
    assert runs[True] != runs[False]
    for step in (0, 6, 11):
        ours, theirs = ([run[step] for run in runs[x]] for x in (True, False))
        spread = math.hypot(statistics.stdev(ours), statistics.stdev(theirs))
        distance = statistics.mean(ours) - statistics.mean(theirs)
        assert abs(distance) < 4 * spread / math.sqrt(SEEDS), f"step {step}"
        assert 0.4 < statistics.stdev(ours) / statistics.stdev(theirs) < 2.5, f"step {step}"


def test_a_run_of_the_same_seed_is_the_same() -> None:
    first, second, other = (losses(s, dropout=0.1, accelerated=True) for s in (3, 3, 4))
    assert first == second != other
