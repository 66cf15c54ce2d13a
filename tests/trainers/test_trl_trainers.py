"""TRL's trainers with an accelerated model: what they log and learn is what they do without."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import trl

from benchmarks.drop_in.trainer_cases import Case, log_difference, run, weight_difference
from benchmarks.drop_in.trainer_setups import GOOD, PAIRS, PROMPTS, TRL, offline
from lora_engine.testing import byte_tokenizer

Compare = Callable[..., None]


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TRL)
def test_every_step_is_the_same(name: str, when: str, compare: Compare) -> None:
    compare(TRL[name], when)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_every_step_is_the_same_on_qwen3(name: str, compare: Compare) -> None:
    compare(TRL[name], "after", family="Qwen3")


@pytest.mark.parametrize("trainer", ["ORPO", "CPO"])
def test_means_over_all_positions_are_the_same_without_padding(
    trainer: str, compare: Compare
) -> None:
    """With padding these trainers' logits/chosen and logits/rejected count its rows too."""
    rows = {"prompt": PROMPTS, "chosen": [], "rejected": []}
    for prompt, good, bad in zip(*PAIRS.values(), strict=True):
        rows["chosen"].append((good + "." * 60)[: 60 - len(prompt)])
        rows["rejected"].append((bad + "!" * 60)[: 60 - len(prompt)])
    compare(Case(partial(offline, trainer, rows)), "after")


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_adapters_that_the_trainer_adds(when: str, compare: Compare) -> None:
    """Added to an accelerated base they run as PEFT's own, with a warning."""
    compare(Case(with_peft_config, lora=False), when)


def with_peft_config(model: Any, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(folder), **settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS, "completion": GOOD}),
        processing_class=byte_tokenizer(),
        peft_config=peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFT", "DPO", "Reward"])
def test_autocast_loses_no_more_than_without(name: str, tmp_path: Path) -> None:
    """TRL's defaults are bfloat16 under autocast; sampled tokens would differ by rounding."""
    case = TRL[name]
    exact = run(case, None, tmp_path)
    theirs, ours = (run(case, when, tmp_path, bf16=None) for when in (None, "after"))
    lost, ours_lost = (
        (log_difference(each, exact, case.but)[0], weight_difference(each, exact)[0])
        for each in (theirs, ours)
    )
    assert all(1e-4 < each < 2e-2 for each in lost)
    assert all(mine <= 2 * other for mine, other in zip(ours_lost, lost, strict=True))


@pytest.mark.slow
def test_weights_in_bfloat16(compare: Compare) -> None:
    compare(TRL["SFT"], "after", tolerance=5e-3, bf16=None, dtype=torch.bfloat16)


def test_all_weights_against_a_reference_model_of_the_trainer_s_making(
    tmp_path: Path, compare: Compare
) -> None:
    """It is loaded from where the model came from, with the attention that the model has now."""
    case = Case(partial(from_a_folder, tmp_path / "model"), lora=False, but=TRL["DPO"].but)
    compare(case, "before")


def from_a_folder(saved: Path, model: Any, folder: Path, **settings: Any) -> Any:
    model.save_pretrained(saved)
    model.config._name_or_path = str(saved)
    return TRL["DPO"].build(model, folder, **settings)
