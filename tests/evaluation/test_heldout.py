import pytest
import torch
from training_helpers import (
    VOCAB,
    count_targets,
    make_examples,
    one_batch,
    oracle_loss_sum,
    tiny_llama,
    tiny_lora,
)

from lora_engine.data.render import Example
from lora_engine.errors import UserError
from lora_engine.evaluation import heldout
from lora_engine.evaluation.nonfinite import NonFiniteError
from lora_engine.objectives.sft import SFT

NO_TARGETS = Example([1, 2, 3], [True, False, False], "none.jsonl:1")


def evaluate(model, batches):
    return heldout.evaluate(model, batches, SFT())


def packed(examples, per_batch):
    return [one_batch(examples[i : i + per_batch]) for i in range(0, len(examples), per_batch)]


@pytest.mark.parametrize("per_batch", [1, 3, 20])
def test_is_the_token_weighted_loss_however_packed(per_batch):
    model, examples = tiny_lora(init_lora_weights=False), make_examples(20)
    result = evaluate(model, packed(examples, per_batch))
    model.eval()
    with torch.no_grad():
        expected = oracle_loss_sum(model, examples).item() / count_targets(examples)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.tokens == sum(len(e) for e in examples)
    assert result.targets == count_targets(examples)


def test_accuracy_is_the_share_of_most_likely_tokens():
    model, ids = tiny_llama(), [5]
    with torch.no_grad():
        for wrong in (False, False, True, False):
            best = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append((best + wrong) % VOCAB)
    example = Example(ids, [False] + [True] * 4, "greedy:1")
    assert evaluate(model, [one_batch([example])]).accuracy == 3 / 4


def test_runs_without_dropout_and_restores_the_mode():
    model = tiny_lora(dropout=0.5, init_lora_weights=False)
    model.train()
    frozen = model.get_base_model().model.layers[0]
    frozen.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    batches = packed(make_examples(5), 5)
    state = torch.get_rng_state()
    first, second = evaluate(model, batches), evaluate(model, batches)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_leaves_no_gradients():
    model = tiny_lora()
    evaluate(model, packed(make_examples(3), 3))
    assert all(p.grad is None for p in model.parameters())


def test_batches_without_targets_are_read_but_not_counted():
    model, examples = tiny_llama(), make_examples(4)
    alone = evaluate(model, packed(examples, 4))
    both = evaluate(model, [one_batch([NO_TARGETS]), *packed(examples, 4)])
    assert both.loss == alone.loss
    assert both.tokens == alone.tokens + 3


def test_nothing_supervised_is_a_clear_error():
    with pytest.raises(UserError, match="no supervised tokens"):
        evaluate(tiny_llama(), [one_batch([NO_TARGETS])])


def test_non_finite_loss_names_samples_and_layer():
    model, examples = tiny_llama(), make_examples(4)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        heldout.result_of([heldout.measure(model, packed(examples, 2), SFT())], SFT(), step=7)
    assert caught.value.step == 7
    assert caught.value.origins == ("data.jsonl:1", "data.jsonl:2")
    assert "layers.1.mlp" in caught.value.layer
    assert "held-out loss is nan" in str(caught.value)
