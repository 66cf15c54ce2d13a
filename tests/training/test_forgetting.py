"""A model that learned one language is trained on another: what it forgets, is seen and is less."""

import copy
import json
import logging
import random
from dataclasses import replace

import peft
import pytest
import torch
from training_helpers import (
    EVAL,
    VOCAB,
    SignalAtStep,
    assert_same_bits,
    lines,
    make_dataset,
    make_trainer,
    tiny_llama,
    tiny_lora,
    trainable,
)

from lora_engine import TrainConfig, Trainer, UserError
from lora_engine.data.batch import collate
from lora_engine.data.dataset import TokenizedDataset
from lora_engine.data.render import Example
from lora_engine.data.replay import with_replay
from lora_engine.evaluation.heldout import HeldoutResult, ProbeResult, evaluate
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.objectives.sft import SFT
from lora_engine.training.state import TrainState


def language(count: int, seed: int, *, name: str, factor: int, offset: int) -> TokenizedDataset:
    """Sequences that begin with the language's token, each other token following from the last."""
    draw, marker = random.Random(seed), len(name)
    examples = []
    for number in range(count):
        ids = [marker, draw.randrange(4, VOCAB)]
        while len(ids) < 14:
            ids.append(4 + (ids[-1] * factor + offset) % (VOCAB - 4))
        examples.append(Example(ids, [place >= 2 for place in range(14)], f"{name}:{number}"))
    return TokenizedDataset(examples, name)


def first(count: int, seed: int) -> TokenizedDataset:
    return language(count, seed, name="a", factor=5, offset=7)


def second(count: int, seed: int) -> TokenizedDataset:
    return language(count, seed, name="bb", factor=3, offset=11)


FIRST, SECOND, PROBE, HELD_OUT = first(200, 0), second(200, 1), first(30, 2), second(30, 3)


@pytest.fixture(scope="module")
def knows_the_first(tmp_path_factory):
    """A model that was trained on the first language, all its weights."""
    model = tiny_llama()
    with torch.random.fork_rng():
        config = TrainConfig(
            output_dir=tmp_path_factory.mktemp("first"),
            max_steps=120,
            tokens_per_batch=256,
            learning_rate=1e-2,
            preflight=False,
        )
        result = Trainer(model, None, FIRST, PROBE, config).fit()
    assert result.heldout_loss_after < 0.1
    return model


def trainer_for(model, folder, train=SECOND, **config):
    """Of a LoRA adapter that learns the second language."""
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(model), lora)
    settings = {"max_steps": 60, "tokens_per_batch": 256, "learning_rate": 1e-2, **config}
    settings = TrainConfig(output_dir=folder, preflight=False, **settings)
    return Trainer(model, None, train, HELD_OUT, settings, probe=PROBE)


@pytest.fixture(scope="module")
def without_help(knows_the_first, tmp_path_factory):
    """The result of a run that nothing keeps from forgetting, and its folder."""
    folder = tmp_path_factory.mktemp("without")
    with torch.random.fork_rng():
        return trainer_for(knows_the_first, folder, eval_every=20).fit(), folder


def test_the_probe_is_measured_before_during_and_after(without_help):
    result, folder = without_help
    measured = [line for line in lines(folder) if "probe_loss" in line]
    assert [line["step"] for line in measured] == [0, 20, 40, 60]
    assert measured[0]["probe_loss"] == result.probe_loss_before < 0.1
    assert measured[-1]["probe_loss"] == result.probe_loss_after > 1
    assert result.probe_accuracy_before > 0.95 > 0.7 > result.probe_accuracy_after
    assert result.heldout_loss_after < 0.1 * result.heldout_loss_before


def test_the_probe_changes_no_weight(tmp_path):
    plain, probed = tiny_lora(), tiny_lora()
    make_trainer(tmp_path / "plain", plain).fit()
    config = TrainConfig(
        output_dir=tmp_path / "probed", max_steps=6, tokens_per_batch=64, learning_rate=5e-3
    )
    train = make_dataset(30)
    Trainer(probed, None, train, EVAL, config, probe=make_dataset(5, seed=9)).fit()
    assert_same_bits(trainable(probed), trainable(plain))


def test_the_probe_is_a_mean_over_its_tokens_whatever_the_objective(tmp_path):
    model, probe = tiny_lora(), make_dataset(9, seed=4)
    expected = evaluate(model, batches_of(probe), SFT())
    config = TrainConfig(output_dir=tmp_path, max_steps=1, tokens_per_batch=30)
    result = Trainer(model, None, make_dataset(5), EVAL, config, probe=probe).fit()
    assert result.probe_loss_before == pytest.approx(expected.loss, rel=1e-6)
    assert result.probe_accuracy_before == expected.accuracy


def batches_of(dataset):
    return [collate([example]) for example in dataset]


def test_replay_forgets_less(knows_the_first, without_help, tmp_path):
    mixed = with_replay(SECOND, FIRST, 0.2)
    result = trainer_for(knows_the_first, tmp_path, mixed).fit()
    plain, _ = without_help
    assert result.probe_loss_after < 0.4 * plain.probe_loss_after
    assert result.heldout_loss_after < 0.15 * result.heldout_loss_before


def test_the_divergence_from_the_base_forgets_less(knows_the_first, without_help, tmp_path):
    result = trainer_for(knows_the_first, tmp_path, kl_to_base=0.3).fit()
    plain, _ = without_help
    assert result.probe_loss_after < 0.7 * plain.probe_loss_after
    assert result.heldout_loss_after < 0.15 * result.heldout_loss_before
    told = [line["kl_to_base"] for line in lines(tmp_path) if "loss" in line]
    assert told[0] == pytest.approx(0, abs=1e-5) and told[-1] > 0.5
    assert not any("heldout_kl_to_base" in line for line in lines(tmp_path))


def test_forgetting_stops_the_run_which_keeps_weights_within_the_limit(
    knows_the_first, tmp_path, caplog
):
    limit = 0.5
    trainer = trainer_for(
        knows_the_first,
        tmp_path,
        eval_every=1,
        stop_on_forgetting=limit,
        schedule="constant",
        max_steps=20,
        learning_rate=4e-3,
    )
    with caplog.at_level(logging.WARNING):
        result = trainer.fit()
    measured = {x["step"]: x["probe_loss"] for x in lines(tmp_path) if "probe_loss" in x}
    *within, last = (loss / measured[0] - 1 for loss in measured.values())
    assert all(rise <= limit for rise in within) and last > limit
    assert (result.stopped, result.steps) == ("forgetting", max(measured))
    assert 0 < result.best_step < result.steps
    assert result.probe_loss_after == measured[result.best_step] <= (1 + limit) * measured[0]
    (line,) = (r.getMessage() for r in caplog.records if "stop_on_forgetting" in r.getMessage())
    assert line.startswith(f"stopped at step {result.steps}: the probe's loss rose by {last:.1%}")
    assert line.endswith(f"the run ends with the weights of step {result.best_step}")
    assert result.warnings[-1] == line
    again = trainer.fit(resume=True)
    assert (again.stopped, again.steps, again.warnings) == (
        "forgetting",
        result.steps,
        result.warnings,
    )


def test_a_run_that_is_cut_off_measures_and_replays_the_same(knows_the_first, tmp_path):
    mixed = with_replay(SECOND, FIRST, 0.25, seed=3)
    config = {"eval_every": 3, "max_steps": 9, "kl_to_base": 0.1, "schedule": "constant"}
    whole = trainer_for(knows_the_first, tmp_path / "whole", mixed, **config)
    expected = whole.fit()
    cut = trainer_for(knows_the_first, tmp_path / "cut", mixed, **config)
    cut.callbacks = type(cut.callbacks)([SignalAtStep(4)])
    assert cut.fit().stopped == "interrupted"
    rest = trainer_for(
        knows_the_first, tmp_path / "cut", with_replay(SECOND, FIRST, 0.25, seed=3), **config
    )
    result = rest.fit(resume=True)
    assert_same_bits(trainable(rest.model), trainable(whole.model))
    for name in ("probe_loss_before", "probe_loss_after", "parted_at", "warnings"):
        assert getattr(result, name) == getattr(expected, name)
    assert rest.state.curve == whole.state.curve


def test_another_probe_is_another_run_and_one_of_no_probe_may_get_one(tmp_path):
    def trainer(probe, folder=tmp_path / "run", **config):
        config = {"max_steps": 2, "tokens_per_batch": 64, **config}
        settings = TrainConfig(output_dir=folder, **config)
        return Trainer(tiny_lora(), None, make_dataset(20), EVAL, settings, probe=probe)

    trainer(make_dataset(3, seed=5)).fit()
    with pytest.raises(UserError, match="another probe"):
        trainer(make_dataset(3, seed=6), max_steps=3).fit(resume=True)
    with pytest.raises(UserError, match="another probe"):
        trainer(None, max_steps=3).fit(resume=True)


def test_several_adapters_are_each_measured_on_the_whole_probe(tmp_path):
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(), lora, adapter_name="one")
    model.add_adapter("two", lora)
    probe = make_dataset(4, seed=8)
    alone = []
    for name in ("one", "two"):
        model.set_adapter(name)
        alone.append(evaluate(model, batches_of(probe), SFT()).loss)
    model.base_model.set_adapter(["one", "two"])
    accelerate(model)
    named = [
        replace(example, adapter=("one", "two")[i % 2]) for i, example in enumerate(make_dataset(8))
    ]
    config = TrainConfig(output_dir=tmp_path, max_steps=1, tokens_per_batch=64, preflight=False)
    data = TokenizedDataset(named)
    result = Trainer(model, None, data, data, config, probe=probe).fit()
    assert alone[0] != alone[1]
    assert result.probe_loss_before == pytest.approx(sum(alone) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heldout": None}, "probe: is measured with the held-out data; give eval_data too"),
        ({"probe": None, "stop_on_forgetting": 0.1}, "there is no probe to tell it by; give one"),
        ({"model": tiny_llama, "kl_to_base": 0.1}, "kl_to_base: compares with .* train an adapter"),
    ],
    ids=["no held-out data", "no probe", "no adapter"],
)
def test_what_would_not_be_measured_is_refused(tmp_path, given, message):
    given = {"heldout": EVAL, "probe": make_dataset(2), "model": tiny_lora, **given}
    heldout, probe, model = (given.pop(name) for name in ("heldout", "probe", "model"))
    config = TrainConfig(output_dir=tmp_path, max_steps=1, eval_every=1, **given)
    with pytest.raises(UserError, match=message):
        Trainer(model(), None, make_dataset(5), heldout, config, probe=probe)


def result_of(loss, accuracy=0.5, probe=None, **metrics):
    measured = None if probe is None else ProbeResult(probe, 0.5, 10)
    return HeldoutResult(loss, accuracy, 10, 10, metrics, measured)


@pytest.mark.parametrize(
    ("by", "best"),
    [("loss", 1), ("accuracy", 0), ("rewards/margins", 2), ("divergence", 1)],
)
def test_the_best_is_told_by_what_is_asked_for(by, best):
    results = [
        result_of(2.0, 0.9, **{"rewards/margins": 0.1, "divergence": 0.3}),
        result_of(1.0, 0.8, **{"rewards/margins": 0.0, "divergence": 0.1}),
        result_of(3.0, 0.7, **{"rewards/margins": 0.2, "divergence": 0.2}),
    ]
    state = TrainState()
    for state.step, result in enumerate(results):
        state.record_heldout(result, by=by)
    assert state.best_step == best


def test_of_equally_good_weights_the_latest_are_the_best():
    """And they are no progress, by which early stopping counts."""
    state, seen = TrainState(), []
    for state.step, loss in enumerate([-0.5, -0.5, -0.75, -0.5, -0.75, -0.75]):
        state.record_heldout(result_of(loss))
        seen.append((state.best_step, state.evals_since_best))
    assert seen == [(0, 0), (1, 1), (2, 0), (2, 1), (4, 2), (5, 3)]


def test_equally_good_weights_that_forgot_too_much_are_not_the_best():
    state = TrainState()
    for state.step, probe in enumerate([1.0, 1.05, 1.2]):
        state.record_heldout(result_of(2.0, probe=probe), most_forgotten=0.1)
    assert (state.best_step, state.evals_since_best) == (1, 2)


def test_a_measure_that_is_not_there_is_named(tmp_path):
    trainer = make_trainer(tmp_path, best_by="acuracy")
    with pytest.raises(UserError, match=r"best_by: acuracy is not .*; did you mean accuracy\?"):
        trainer.fit()


def test_weights_that_forgot_too_much_are_not_the_best():
    state = TrainState()
    for state.step, (loss, probe) in enumerate([(3.0, 1.0), (2.0, 1.05), (1.0, 1.2)]):
        state.record_heldout(result_of(loss, probe=probe), most_forgotten=0.1)
    assert state.best_step == 1
    assert state.forgotten == pytest.approx(0.2) and state.has_forgotten(0.1)
    restored = TrainState.from_json(json.loads(json.dumps(state.to_json())))
    assert restored == state


def test_a_checkpoint_of_before_there_were_probes_is_read():
    state = TrainState()
    state.record_heldout(result_of(2.0))
    saved = json.loads(json.dumps(state.to_json()))
    for name in ("loss_sum", "loss_count", "curve", "parted_at", "warnings"):
        del saved[name]
    for name in ("before", "latest", "best"):
        del saved[name]["probe"]
    assert TrainState.from_json(saved).before == state.before


def test_a_run_that_learns_by_heart_says_since_when(tmp_path, caplog):
    few = make_dataset(4)
    noise = random.Random(1)
    for example in few:  # nothing in them follows from anything
        example.input_ids[:] = [noise.randrange(VOCAB) for _ in example.input_ids]
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            tmp_path, train=few, max_steps=20, eval_every=2, learning_rate=3e-2, schedule="constant"
        )
        result = trainer.fit()
    measured = {x["step"]: x["heldout_loss"] for x in lines(tmp_path) if "heldout_loss" in x}
    assert result.parted_at == result.best_step == min(measured, key=measured.get)
    (line,) = result.warnings
    assert line.startswith(f"training and held-out loss part after step {result.parted_at}: ")
    assert [r.getMessage() for r in caplog.records].count(line) == 1
