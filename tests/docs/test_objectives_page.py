"""The example of docs/objectives.md is an objective, and does what it says."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from online_runs import PROMPTS, TOKENIZER, vowels, writer
from training_helpers import make_examples, one_batch

import lora_engine
from lora_engine.objectives import base
from lora_engine.objectives.answers import check_objective

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def example(of: str) -> str:
    """The block of Python that has these words."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if of in block)
    return block


def test_rewards_in_python(tmp_path: Path) -> None:
    config = lora_engine.TrainConfig(output_dir=tmp_path, max_steps=1, preflight=False)
    given = {
        "lora_engine": lora_engine,
        "polite": vowels,
        "model": writer(),
        "tokenizer": TOKENIZER,
        "prompts": PROMPTS[:8],
        "held_out": PROMPTS[8:],
        "config": config,
    }
    exec(example("online = Online"), given)
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert len(lines) == 64 + 2 * 2
    assert json.loads(lines[-1])["rewards"].keys() == {"vowels", "json_valid"}


def test_the_example_is_right() -> None:
    given: dict[str, Any] = {**vars(base), **vars(dataclasses), "__name__": __name__}
    exec(example("class Focal"), given)
    objective, batch = given["Focal"](gamma=1.5), one_batch(make_examples(4))
    check_objective(objective, "Trainer")
    p = torch.linspace(0.1, 0.9, batch.num_targets, requires_grad=True)
    logprobs = p.log()
    scores = base.TargetScores(logprobs, logprobs.sum(), torch.zeros(len(p), dtype=torch.bool))
    loss = objective(scores, batch)
    assert loss.total.item() == pytest.approx(float(-((1 - p) ** 1.5 * logprobs).sum()))
    assert loss.metrics["likelihood"].total.item() == pytest.approx(p.sum().item())
    assert objective.weight(batch) == batch.num_targets > 4
