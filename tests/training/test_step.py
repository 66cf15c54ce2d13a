from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import (
    assert_same_bits,
    count_targets,
    make_examples,
    one_batch,
    oracle_loss_sum,
    tiny_lora,
    trainable,
)

from lora_engine.data.render import Example
from lora_engine.evaluation.nonfinite import NonFiniteError
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.objectives.sft import SFT
from lora_engine.training import random_state
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.adamw import FlatAdamW
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.signals import Interrupted
from lora_engine.training.step import TrainStep

NO_TARGETS = Example([1, 2, 3], [False, False, False], "none.jsonl:1")
EXAMPLES = make_examples(12)


def make_step(model=None, **config):
    model = tiny_lora(init_lora_weights=False) if model is None else model
    model.train()
    flat = FlatParameters(model.named_parameters())
    return TrainStep(model, SFT(), FlatAdamW(flat, TrainConfig(**config)))


def no_check():
    pass


def flat_gradient(step, micro_batches, learning_rate=1e-3):
    result = step(1, micro_batches, learning_rate, no_check)
    return result, step.optimizer.flat.grad.clone()


def split(cuts):
    edges = [0, *sorted(cuts), len(EXAMPLES)]
    parts = [EXAMPLES[a:b] for a, b in pairwise(edges)]
    return [one_batch(part) for part in parts if part]


@pytest.fixture(scope="module")
def large():
    """One micro-batch with all examples."""
    return flat_gradient(make_step(), [one_batch(EXAMPLES)])


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
@settings(max_examples=12, deadline=None)
@given(cuts=st.sets(st.integers(1, len(EXAMPLES) - 1), max_size=5))
def test_any_split_into_micro_batches_is_one_large_batch(large, accelerated, cuts):
    expected, gradient = large
    model = tiny_lora(init_lora_weights=False)
    if accelerated:
        accelerate(model)
    result, actual = flat_gradient(make_step(model), split(cuts))
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert (result.tokens, result.supervised_tokens) == (
        expected.tokens,
        expected.supervised_tokens,
    )
    torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-6 * expected.grad_norm)


def test_gradient_is_that_of_the_mean_over_all_targets(large):
    result, gradient = large
    model = tiny_lora(init_lora_weights=False)
    loss = oracle_loss_sum(model, EXAMPLES) / count_targets(EXAMPLES)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    flat = FlatParameters(tiny_lora(init_lora_weights=False).named_parameters())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for entry in flat.entries:
        torch.testing.assert_close(
            entry.view(gradient), gradients[entry.name], rtol=1e-4, atol=1e-6 * result.grad_norm
        )


def test_micro_batch_without_targets_changes_nothing(large):
    expected, gradient = large
    result, actual = flat_gradient(make_step(), [one_batch([NO_TARGETS]), one_batch(EXAMPLES)])
    assert torch.equal(actual, gradient)
    assert result.loss == expected.loss
    assert result.tokens == expected.tokens + 3


def test_step_without_any_target_leaves_the_weights():
    step = make_step(weight_decay=0.5)
    before = trainable(step.model)
    result = step(1, [one_batch([NO_TARGETS])], 0.1, no_check)
    assert (result.loss, result.grad_norm, result.supervised_tokens) == (0.0, 0.0, 0)
    assert step.optimizer.updates == 0
    assert_same_bits(trainable(step.model), before)


def test_gradients_do_not_leak_into_the_next_step(large):
    step = make_step()
    step(1, [one_batch(EXAMPLES[:3])], 1e-30, no_check)
    _, gradient = flat_gradient(step, [one_batch(EXAMPLES)], 1e-30)
    torch.testing.assert_close(gradient, large[1], rtol=1e-6, atol=0)


def test_16_bit_parameters_learn_in_small_steps():
    model = tiny_lora()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()
    model = model.to(torch.bfloat16)
    step = make_step(model)
    before = step.optimizer.flat.data.clone()
    weights = trainable(model)
    for _ in range(3):
        step(1, [one_batch(EXAMPLES)], 1e-6, no_check)
    assert {p.dtype for p in weights.values()} == {torch.bfloat16}
    moved = (step.optimizer.flat.data - before).abs()
    assert 0 < moved.max() < 1e-5
    for entry in step.optimizer.flat.entries:
        master = entry.view(step.optimizer.flat.data)
        assert torch.equal(entry.parameters[0], master.bfloat16())


def poison_sample(model, token, value=float("nan")):
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = value


def test_non_finite_loss_names_the_samples_and_the_layer():
    model = tiny_lora(dropout=0.3, init_lora_weights=False)
    bad = Example([60, 60, 60], [False, True, True], "bad.jsonl:3")
    poison_sample(model, 60)
    step = make_step(model)
    # Tied: the head would make every loss NaN, so give it its own weight.
    head = torch.nn.Linear(32, 61, bias=False)
    model.get_base_model().lm_head = head.requires_grad_(False)
    before, random_before = trainable(model), random_state.capture()[0]
    clean = [e for e in EXAMPLES if 60 not in e.input_ids]
    with pytest.raises(NonFiniteError) as caught:
        step(5, [one_batch(clean), one_batch([bad])], 0.1, no_check)
    assert caught.value.step == 5
    assert caught.value.origins == ("bad.jsonl:3",)
    assert "embed_tokens (its weight is not finite)" in caught.value.layer
    assert str(caught.value).startswith("step 5: the loss is nan; first bad layer")
    assert_same_bits(trainable(model), before)
    assert step.optimizer.updates == 0
    assert not step.optimizer.exp_avg.any()
    assert_same_bits(random_state.capture()[0], random_before)


def test_non_finite_gradient_names_the_parameter():
    model = tiny_lora(init_lora_weights=False)
    name, parameter = next((n, p) for n, p in model.named_parameters() if "k_proj.lora_B" in n)
    parameter.register_hook(lambda grad: grad * float("inf"))
    step = make_step(model)
    before = trainable(model)
    with pytest.raises(NonFiniteError) as caught:
        step(2, [one_batch(EXAMPLES[:2])], 0.1, no_check)
    assert caught.value.layer == name
    assert caught.value.origins == tuple(e.origin for e in EXAMPLES[:2])
    assert "the gradient's norm is" in str(caught.value)
    assert_same_bits(trainable(model), before)


def test_interruption_between_micro_batches_leaves_no_trace():
    step = make_step(tiny_lora(dropout=0.3, init_lora_weights=False))
    before, random_before = trainable(step.model), random_state.capture()[0]
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        step(1, split([4, 8]), 0.1, check)
    assert_same_bits(trainable(step.model), before)
    assert_same_bits(random_state.capture()[0], random_before)
    assert step.optimizer.updates == 0
