"""Several adapters over one base: each learns from the records that name it, as if alone."""

from dataclasses import replace

import pytest
import torch
from training_helpers import TRAIN, make_trainer, trainable
from two_adapters import BOTH, NAMES, PARTS, two_adapters

from lora_engine.data.batch import collate
from lora_engine.data.dataset import TokenizedDataset
from lora_engine.errors import UserError
from lora_engine.evaluation.heldout import evaluate
from lora_engine.evaluation.nonfinite import first_nonfinite_layer
from lora_engine.objectives.sft import SFT
from lora_engine.training.batches import fingerprint


def fit(folder, model, examples, **config):
    """Three steps, each on all of the examples in one batch."""
    settings = {"max_steps": 3, "tokens_per_batch": 4096, "max_grad_norm": None, "eps": 1e-12}
    dataset = TokenizedDataset(examples)
    make_trainer(folder, model, dataset, None, **{**settings, **config}).fit()
    return trainable(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_adapter_learns_as_if_alone(tmp_path, checkpointing):
    model = two_adapters()
    if checkpointing:  # layers run again in the backward pass, with the same routes
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    together = fit(tmp_path / "both", model, BOTH.examples)
    for name, examples in PARTS.items():
        before = trainable(two_adapters([name]))
        alone = fit(tmp_path / name, two_adapters([name]), examples)
        assert len(alone) == 28
        for key, weight in alone.items():
            assert (weight - before[key]).abs().max() > 1e-3
            torch.testing.assert_close(together[key], weight, rtol=1e-3, atol=1e-4)


def test_evaluation_runs_each_example_through_its_adapter():
    both = evaluate(two_adapters(), [collate(BOTH.examples, share_prefixes=True)], SFT())
    alone = [evaluate(two_adapters([name]), [collate(part)], SFT()) for name, part in PARTS.items()]
    targets = sum(result.targets for result in alone)
    assert both.targets == targets
    expected = sum(result.loss * result.targets for result in alone) / targets
    assert both.loss == pytest.approx(expected, rel=1e-5)
    assert abs(alone[0].loss - alone[1].loss) > 1e-3


def test_learning_rates_by_adapter(tmp_path):
    before = trainable(two_adapters())
    rates = {"other": 1e-6}
    after = fit(tmp_path, two_adapters(), BOTH.examples, adapter_learning_rates=rates)
    moved = {n: max((after[k] - before[k]).abs().max() for k in after if n in k) for n in NAMES}
    assert moved["other"] < 1e-5 < 1e-3 < moved["default"]


def test_the_bad_layer_is_found_under_routing():
    model = two_adapters()
    with torch.no_grad():
        model.base_model.model.model.norm.weight[0] = torch.nan
    assert "norm" in first_nonfinite_layer(model, collate(BOTH.examples), SFT())


def test_another_adapter_is_other_data():
    assert fingerprint(PARTS["default"]) != fingerprint(
        [replace(e, adapter="other") for e in PARTS["default"]]
    )


@pytest.mark.parametrize(
    ("active", "adapter", "message"),
    [
        (NAMES, "othr", "data.jsonl:2: no adapter 'othr' is trained; did you mean other?"),
        (
            ["default"],
            "other",
            "data.jsonl:2: no adapter 'other' is trained; there is default",
        ),
        (NAMES, "", "data.jsonl:2: names no adapter; give every record 'adapter': default or"),
    ],
    ids=["unknown", "inactive", "missing"],
)
def test_records_that_fit_no_adapter_are_refused(tmp_path, active, adapter, message):
    examples = [replace(e, adapter="default") for e in TRAIN.examples[:5]]
    examples[1:3] = [replace(e, adapter=adapter) for e in examples[1:3]]
    with pytest.raises(
        UserError, match=rf"2 of 5 records cannot be used, mend or remove them:\n +{message}"
    ):
        make_trainer(tmp_path, two_adapters(active), TokenizedDataset(examples))


def test_a_single_adapter_needs_no_names(tmp_path):
    named = fit(tmp_path / "a", two_adapters(["default"]), PARTS["default"])
    plain = [replace(e, adapter="") for e in PARTS["default"]]
    unnamed = fit(tmp_path / "b", two_adapters(["default"]), plain)
    assert all(torch.equal(named[key], unnamed[key]) for key in unnamed)
