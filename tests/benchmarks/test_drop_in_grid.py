"""The grid of models under accelerate, and the table that it puts into the documentation."""

import json
from typing import Any

import pytest
import torch

from benchmarks.drop_in import drop_in_grid, drop_in_table
from benchmarks.drop_in.drop_in_cells import CELLS, TOLERANCE, distance
from benchmarks.drop_in.drop_in_models import Configuration, small_config
from lora_engine.models.attach.coverage import CoverageReport

LLAMA = Configuration("llama", "llama", "LlamaForCausalLM")
RESULTS = json.loads(drop_in_table.RESULTS.read_text())


def test_a_llama_is_right_in_every_cell() -> None:
    row = drop_in_grid.row(LLAMA, "LoRA")
    assert row is not None
    assert {name: cell["outcome"] for name, cell in row["cells"].items()} == dict.fromkeys(
        CELLS, "right"
    )
    assert row["flops"] == 1 and row["left"] == []


def test_what_accelerate_breaks_is_wrong_or_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(model: Any) -> CoverageReport:
        model.model.norm.weight.data.mul_(1.01)
        model.generate = None
        return CoverageReport()

    monkeypatch.setattr(drop_in_grid.lora_engine, "accelerate", off)
    row = drop_in_grid.row(LLAMA, "full")
    assert row is not None
    outcomes = {name: cell["outcome"] for name, cell in row["cells"].items()}
    assert outcomes.pop("greedy") == outcomes.pop("beams") == "crash"
    assert set(outcomes.values()) == {"wrong"}


def test_experts_are_adapted_where_there_are_some() -> None:
    assert drop_in_grid.row(LLAMA, "experts") is None
    model = Configuration("mixtral", "mixtral", "MixtralForCausalLM").build()
    adapted = drop_in_grid.adapted(model, "experts", "causal")
    assert any("experts" in n and "lora_A" in n for n, _ in adapted.named_parameters())


def test_models_are_the_same_on_every_call_and_drop_nothing_out() -> None:
    first, second = LLAMA.build().state_dict(), LLAMA.build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert small_config("gpt2", {}).attn_pdrop == 0


def test_a_small_gradient_is_judged_by_the_largest() -> None:
    theirs = {"large": torch.ones(3), "small": torch.full((3,), 1e-6)}
    ours = theirs | {"small": torch.full((3,), 2e-6)}
    assert distance(ours, theirs)[0] < TOLERANCE
    assert distance(theirs | {"large": torch.full((3,), 1.001)}, theirs) == (
        pytest.approx(1e-3, rel=1e-3),
        "large",
    )
    assert distance(theirs | {"large": torch.tensor([1.0, 1.0, torch.nan])}, theirs)[0] > 1


def test_the_committed_results_are_of_sixty_configurations_and_none_is_wrong() -> None:
    asked = [row for row in RESULTS["rows"] if "cells" in row]
    assert len({row["name"] for row in asked}) >= 60
    assert {row["adaptation"] for row in asked} == {"LoRA", "experts", "full"}
    outcomes = [cell["outcome"] for row in asked for cell in row["cells"].values()]
    assert set(outcomes) == {"right", "transformers' own raises"}
    assert outcomes.count("right") > 0.95 * len(outcomes)


def test_the_table_in_the_documentation_is_made_of_the_committed_results() -> None:
    page = drop_in_table.PAGE.read_text()
    assert drop_in_table.with_section(page, drop_in_table.section(RESULTS)) == page
    assert "| llama | 12 right |  | 12 right | 100% |  |" in page
