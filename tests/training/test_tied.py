"""Parameters that are the same memory: trained, resumed and saved as one.

The oracle is PEFT's own forward and torch's AdamW over each memory once. (torch's optimizer knows
parameters by identity: given both of PEFT's tied factors it would step their memory twice.)
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from training_helpers import (
    EVAL,
    SignalAtStep,
    assert_same_bits,
    count_targets,
    lines,
    make_dataset,
    make_trainer,
    oracle_loss_sum,
    tiny_llama,
    trainable,
)

from lora_engine.models.attach.accelerate import accelerate

STEPS, RATE, EPS = 4, 1e-2, 1e-3
DATA = make_dataset(12)

TIED: dict[str, dict[str, Any]] = {
    "tied adapters": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "adapter of the head": {"target_modules": ["lm_head", "v_proj"], "ensure_weight_tying": True},
    "tied modules to save": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied head to save": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "head untied by PEFT": {"modules_to_save": ["lm_head"]},
    "norms to save": {"modules_to_save": ["norm"]},
}


def adapted(case: str) -> Any:
    """The tiny model with that adapter, its values drawn so that no gradient is zero."""
    options = {"target_modules": ["q_proj"], "r": 3, "task_type": "CAUSAL_LM", **TIED[case]}
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about tied modules, which some cases are about
        return peft.get_peft_model(
            tiny_llama(), peft.LoraConfig(**options, init_lora_weights=False)
        )


MAKERS: dict[str, Callable[[], Any]] = {
    **{case: partial(adapted, case) for case in TIED},
    "all weights": tiny_llama,
}


def memories(model: Any) -> dict[int, list[torch.nn.Parameter]]:
    """The trained parameters by address; those of one address are one memory."""
    found: dict[int, list[torch.nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            found.setdefault(p.data_ptr(), []).append(p)
    return found


def same_names(model: Any) -> list[list[str]]:
    """Names of parameters, tied ones included, that are one memory."""
    found: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            found.setdefault(p.data_ptr(), []).append(name)
    return sorted(names for names in found.values() if len(names) > 1)


def oracle_losses(model: Any) -> list[float]:
    """Losses of STEPS steps on all of DATA in float32 with torch's AdamW; leaves them trained."""
    groups = list(memories(model).values())
    optimizer = torch.optim.AdamW([group[0] for group in groups], lr=RATE, eps=EPS, weight_decay=0)
    losses = []
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = oracle_loss_sum(model, DATA.examples) / count_targets(DATA.examples)
        loss.backward()
        for first, *others in groups:
            for other in others:  # of the same elements in another order: PEFT's transposes
                first.grad += other.grad if other.shape == first.shape else other.grad.T
                other.grad = None
        optimizer.step()
        losses.append(loss.item())
    return losses


def trainer(folder: Any, model: Any, **config: Any) -> Any:
    settings = {
        "max_steps": STEPS,
        "tokens_per_batch": 4096,
        "learning_rate": RATE,
        "schedule": "constant",
        "eps": EPS,
        "max_grad_norm": None,
        "final_weights": "last",
    }
    return make_trainer(folder, model, DATA, EVAL, **{**settings, **config})


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("case", MAKERS)
def test_trains_like_the_oracle_and_stays_tied(tmp_path, case, fast):
    expected_model, model = MAKERS[case](), MAKERS[case]()
    ties = same_names(model)
    assert ties or case in ("head untied by PEFT", "norms to save")
    expected = oracle_losses(expected_model)
    if fast:
        accelerate(model)
    trainer(tmp_path, model).fit()
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses == pytest.approx(expected, rel=2e-5)
    assert losses[-1] < losses[0] - 0.1
    weights = trainable(expected_model)
    for name, weight in trainable(model).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=2e-4)
    assert same_names(model) == ties


@pytest.mark.parametrize("case", ["tied adapters", "tied modules to save", "all weights"])
def test_resumes_to_the_same_weights(tmp_path, case):
    whole = MAKERS[case]()
    trainer(tmp_path / "whole", whole).fit()
    stopped = trainer(tmp_path / "run", MAKERS[case](), callbacks=[SignalAtStep(2)])
    assert stopped.fit().stopped == "interrupted"
    resumed = MAKERS[case]()
    trainer(tmp_path / "run", resumed).fit(resume=True)
    assert_same_bits(trainable(resumed), trainable(whole))
    assert same_names(resumed) == same_names(whole)


@pytest.mark.parametrize("case", TIED)
def test_saved_adapter_gives_peft_the_same_logits(tmp_path, case):
    model = MAKERS[case]()
    trainer(tmp_path, model, max_steps=2).fit()
    ids = torch.arange(10)[None]
    expected = model(input_ids=ids).logits
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
