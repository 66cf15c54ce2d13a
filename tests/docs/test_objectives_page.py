"""The example of docs/objectives.md is an objective, and does what it says."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import make_examples, one_batch

from lora_engine.objectives import base
from lora_engine.objectives.answers import check_objective

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_the_example_is_right() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    given: dict[str, Any] = {**vars(base), **vars(dataclasses), "__name__": __name__}
    exec(blocks[0], given)
    objective, batch = given["Focal"](gamma=1.5), one_batch(make_examples(4))
    check_objective(objective, "Trainer")
    p = torch.linspace(0.1, 0.9, batch.num_targets, requires_grad=True)
    logprobs = p.log()
    scores = base.TargetScores(logprobs, logprobs.sum(), torch.zeros(len(p), dtype=torch.bool))
    loss = objective(scores, batch)
    assert loss.total.item() == pytest.approx(float(-((1 - p) ** 1.5 * logprobs).sum()))
    assert loss.metrics["likelihood"].total.item() == pytest.approx(p.sum().item())
    assert objective.weight(batch) == batch.num_targets > 4
