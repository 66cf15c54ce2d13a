"""A try before the run: right models pass, and what is measured is right."""

import json

import pytest
import torch
from torch import nn
from training_helpers import (
    accelerated,
    count_targets,
    layer,
    make_dataset,
    make_examples,
    one_batch,
    oracle_loss_sum,
    rows,
    tiny_llama,
    tiny_lora,
    trainable,
)

from lora_engine import UserError, accelerate, preflight

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SINGLE, BRAIN, HALF, DOUBLE = DTYPES


RIGHT = {
    "lora": lambda dtype: tiny_lora(dtype=dtype),
    "lora in the model's dtype": lambda dtype: tiny_lora(dtype=dtype, autocast_adapter_dtype=False),
    "dropout": lambda dtype: tiny_lora(0.3, dtype),
    "DoRA": lambda dtype: tiny_lora(dtype=dtype, use_dora=True),
    "rsLoRA": lambda dtype: tiny_lora(dtype=dtype, use_rslora=True),
    "full": tiny_llama,
}


RIGHT_IN_FLOAT32 = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "head in full": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "embedding and tied head": {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
}


TRIED = [
    *(("lora", dtype, fast) for dtype in DTYPES for fast in (False, True)),
    *(("full", dtype, False) for dtype in DTYPES),
    ("full", SINGLE, True),
    ("lora in the model's dtype", BRAIN, True),
    ("lora in the model's dtype", HALF, False),
    ("dropout", SINGLE, False),
    ("dropout", BRAIN, True),
    ("DoRA", SINGLE, False),
    ("DoRA", BRAIN, True),
    ("rsLoRA", SINGLE, True),
]


@pytest.mark.parametrize(("case", "dtype", "fast"), TRIED, ids=str)
@pytest.mark.filterwarnings("ignore:.*float16:UserWarning")
def test_right_models_pass(case, dtype, fast):
    model = RIGHT[case](dtype)
    if fast:
        accelerate(model)
    for batch in (rows(), one_batch(make_examples(6))):
        report = preflight(model, batch)
        assert 0.9 * report.loss_before < report.loss_after < 0.99 * report.loss_before
        assert (report.parameters, report.unreached) == (len(trainable(model)), 0)
        assert all(norm > 0 for norm in report.gradient_norms.values())


@pytest.mark.parametrize(
    ("case", "fast"),
    [("PiSSA", False), ("tokens", False), *((case, True) for case in list(RIGHT_IN_FLOAT32)[1:])],
)
def test_right_adapters_of_other_kinds_pass(case, fast):
    model = tiny_lora(**RIGHT_IN_FLOAT32[case])
    if fast:
        accelerate(model)
    report = preflight(model, rows())
    assert report.loss_after < 0.99 * report.loss_before
    assert report.unreached == 0


def test_what_it_measures_is_right():
    model = tiny_lora()
    batch, examples = rows(), make_examples(6)
    loss = model(**batch).loss
    loss.backward()
    of_b = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_B" in n])
    report = preflight(model, batch)
    assert report.loss_before == pytest.approx(loss.item(), rel=1e-6)
    assert set(report.gradient_norms) == {"lora_A", "lora_B"}
    assert report.gradient_norms["lora_B"] == pytest.approx(of_b.norm().item(), rel=1e-5)
    assert report.parameters == 28
    assert 0 < report.seconds < 60
    packed = preflight(model, one_batch(examples))
    mean = oracle_loss_sum(model, examples) / count_targets(examples)
    assert packed.loss_before == pytest.approx(mean.item(), rel=1e-5)
    assert str(packed).startswith(f"loss {packed.loss_before:.4g} falls to {packed.loss_after:.4g}")
    assert "reach 28 of 28 trained tensors" in str(packed)


def preference(model, batch):
    """−log σ(chosen − rejected), each the log-probability of its rows' tokens."""
    logits = model(**batch).logits[:, :-1].log_softmax(-1)
    taken = logits.gather(-1, batch["input_ids"][:, 1:, None]).sum((1, 2))
    chosen, rejected = taken.chunk(2)
    return -nn.functional.logsigmoid(0.1 * (chosen - rejected))


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
def test_a_loss_of_the_users_own(fast):
    model = accelerated(tiny_lora()) if fast else tiny_lora()
    batch = {key: value for key, value in rows(4).items() if key != "labels"}
    report = preflight(model, batch, loss=preference)
    expected = preference(model, batch).mean().item()
    assert report.loss_before == pytest.approx(expected, rel=1e-5)
    assert report.loss_after < 0.99 * report.loss_before
    layer(model).mlp.up_proj.lora_B["default"].weight.register_hook(torch.neg)
    with pytest.raises(UserError, match=r"up_proj\.lora_B\.default\.weight is wrong"):
        preflight(model, batch, loss=preference)
    with pytest.raises(UserError, match="the loss function returned"):
        preflight(model, batch, loss=lambda model, batch: 1.0)


def test_a_loss_that_is_zero_where_it_begins_falls():
    """As GRPO's, whose advantages sum to zero."""
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None]
    batch = {key: value for key, value in rows(4).items() if key != "labels"}

    def taken(model, batch):
        logits = model(**batch).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]

    def loss(model, batch):
        return -(taken(model, batch) - old).exp() * advantages

    model = tiny_lora()
    old = taken(model, batch).detach()
    report = preflight(model, batch, loss=loss)
    assert report.loss_after < -5e-5 < report.loss_before < 1e-6
    layer(model).mlp.up_proj.lora_B["default"].weight.register_hook(torch.neg)
    with pytest.raises(UserError, match=r"up_proj\.lora_B\.default\.weight is wrong"):
        preflight(model, batch, loss=loss)


def test_its_report_is_made_of_plain_numbers():
    from dataclasses import asdict

    report = asdict(preflight(tiny_lora(), one_batch(make_dataset(4).examples)))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
