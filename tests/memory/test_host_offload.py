"""What waits on the host: the same bits, in the order of copies and waits that a GPU needs."""

import pytest
import torch
from late_copies import LateCopies
from test_checkpointing import POLICIES, step, with_dropout
from training_helpers import TRAIN, assert_same_bits, make_trainer, tiny_llama, tiny_lora, trainable

import lora_engine
from lora_engine import backends
from lora_engine.backends.copies import CopiesAtOnce
from lora_engine.data.batch import collate
from lora_engine.errors import UserError
from lora_engine.evaluation.batch_loss import batch_loss
from lora_engine.memory.checkpointing import checkpointing
from lora_engine.memory.host_activations import HostActivations
from lora_engine.memory.offload import ActivationStore
from lora_engine.objectives.sft import SFT
from lora_engine.testing import tiny_llama as llama_of
from lora_engine.testing import with_lora
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.choice import flat_optimizer
from lora_engine.training.optimizer.flat import FlatParameters

MAKERS = [LateCopies, CopiesAtOnce]


def test_who_does_not_wait_reads_nothing():
    copies, source, target = LateCopies(), torch.ones(3), torch.zeros(3)
    copy = copies.begin(target, source)
    assert target.isnan().all()
    copy.wait()
    assert torch.equal(target, source)


def test_what_is_gone_before_its_copy_is_noticed():
    copies, target = LateCopies(), torch.zeros(3)
    copies.begin(target, torch.ones(3))
    with pytest.raises(AssertionError, match="the source is gone before its copy"):
        copies.finish()


# What checkpointed layers keep.


@pytest.mark.parametrize("copies", MAKERS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", [True, False], ids=["accelerated", "plain"])
def test_loss_and_gradients_have_the_same_bits(policy, engine, copies):
    if not engine and policy in ("half", "selective"):
        pytest.skip("needs the engine's halves")
    model, batch = with_dropout(), collate(TRAIN.examples[:9])
    if engine:
        lora_engine.accelerate(model, strict=True)
    expected = step(model, batch)
    store = ActivationStore(HostActivations(copies()))
    with checkpointing(model, policy, store):
        for _ in range(3):
            assert all(map(torch.equal, step(model, batch), expected))
    store.close()


def four_layers():
    model = with_lora(llama_of(vocab_size=61, layers=4))
    lora_engine.accelerate(model, strict=True)
    return model


def test_copies_are_begun_ahead_and_waited_for():
    copies, model = LateCopies(), four_layers()
    store = ActivationStore(HostActivations(copies))
    with checkpointing(model, "layer", store):
        loss = batch_loss(model, collate(TRAIN.examples[:9]), SFT()).total
        assert copies.log == ["begin 0", "begin 1", "wait 0", "begin 2", "wait 1", "begin 3"]
        # Two layers' inputs are on the device, whatever the number of layers.
        assert [not source.expired() for source in copies.sources] == [False, False, True, True]
        copies.log.clear()
        loss.backward()
    # The last two had not left. While a layer runs again, the one before it comes back.
    assert copies.log == ["wait 3", "wait 2", "begin 4", "wait 4", "begin 5", "wait 5"]


def test_a_wait_that_is_missing_is_noticed():
    model, batch = four_layers(), collate(TRAIN.examples[:9])
    expected = step(model, batch)

    def same(forget):
        copies = LateCopies(forget)
        store = ActivationStore(HostActivations(copies))
        try:
            with checkpointing(model, "layer", store):
                found = [*step(model, batch), *step(model, batch)]
            store.close()
            copies.finish()
        except AssertionError:
            return False, copies.waits
        return all(map(torch.equal, found, [*expected, *expected])), copies.waits

    whole, waits = same(None)
    assert whole and waits == 2 * 6
    # Of each step two are missed below alone: transformers holds the embedding's output until the
    # next wait, and the wait for the last input, which comes first, is one for the last but one.
    assert [forget for forget in range(waits) if same(forget)[0]] == [0, 3, 6, 9]


@pytest.mark.parametrize(("order", "covered"), [((3, 2, 1, 0), [3]), ((2, 3, 1, 0), [])])
def test_every_wait_is_needed_for_tensors_that_nobody_else_holds(order, covered):
    """covered: those that a wait for a later copy came before."""

    def same(forget):
        copies, right = LateCopies(forget), True
        activations = HostActivations(copies)
        try:
            kept = [activations.keep(torch.full((3,), float(n))) for n in range(4)]
            for n in order:
                right &= kept[n].unpack().tolist() == [n] * 3
                kept[n] = None
            activations.close()
            copies.finish()
        except AssertionError:
            right = False
        return right, copies.waits

    whole, waits = same(None)
    assert whole and waits == 6
    assert [forget for forget in range(waits) if same(forget)[0]] == covered


def test_a_second_backward_pass_reads_again():
    model = four_layers()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with checkpointing(model, "half", ActivationStore(HostActivations(LateCopies()))):
        loss = batch_loss(model, collate(TRAIN.examples[:9]), SFT()).total
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


def test_two_graphs_at_once():
    model, batch = four_layers(), collate(TRAIN.examples[:9])
    expected = step(model, batch)[1:]
    parameters = [p for p in model.parameters() if p.requires_grad]
    with checkpointing(model, "layer", ActivationStore(HostActivations(LateCopies()))):
        losses = [batch_loss(model, batch, SFT()).total for _ in range(2)]
        del losses[1]
        losses.append(batch_loss(model, batch, SFT()).total)
        for loss in losses:
            assert all(map(torch.equal, torch.autograd.grad(loss, parameters), expected))


def test_an_input_that_changes_before_it_has_left_is_noticed():
    activations = HostActivations(LateCopies())
    x = torch.ones(3)
    kept = activations.keep(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="was changed in place before it was on the host"):
        kept.unpack()


# The optimiser's state.


def updated(monkeypatch, copies, place, name, forget=None, **settings):
    """Weights and state after three updates of a made model, its state in pieces of 256 values."""
    made = copies(forget) if forget is not None else copies()
    monkeypatch.setattr(backends, "copies", lambda device: made)
    config = TrainConfig(optimizer=name, offload_optimizer=place, weight_decay=0.1, **settings)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(50, 30), torch.nn.Linear(30, 7))
    flat = FlatParameters(model.named_parameters(), masters=True)
    optimizer = flat_optimizer(flat, config)
    if place is not None:
        optimizer._state._size = 256
    for _ in range(3):
        flat.grad.copy_(torch.randn_like(flat.grad))
        optimizer.step(0.1, optimizer.grad_norm())
    state = optimizer.tensors()
    copies_made = getattr(made, "waits", 0)
    values = [flat.data.clone(), *(x for named in state.values() for x in named.values())]
    return values, copies_made


OPTIMIZERS = ["adamw", "adamw_8bit", "lion"]


@pytest.mark.parametrize("copies", MAKERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_have_the_same_bits(monkeypatch, name, copies):
    expected, _ = updated(monkeypatch, copies, None, name)
    found, waits = updated(monkeypatch, copies, "host", name)
    assert len(found) > 1 and all(map(torch.equal, found, expected))
    assert waits or copies is CopiesAtOnce


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_wait_for_a_piece_is_needed(monkeypatch, name):
    expected, _ = updated(monkeypatch, LateCopies, None, name)
    _, waits = updated(monkeypatch, LateCopies, "host", name)
    assert waits == 3 * 7  # pieces
    for forget in range(waits):
        found, _ = updated(monkeypatch, LateCopies, "host", name, forget)
        assert not all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_has_the_same_weights_and_is_resumed(tmp_path, monkeypatch, name):
    copies = LateCopies()
    monkeypatch.setattr(backends, "copies", lambda device: copies)
    settings = {"checkpointing": "layer", "final_weights": "last", "optimizer": name}
    host = {"offload_activations": "host", "offload_optimizer": "host"}
    plain, parts = tiny_lora(dropout=0.1), tiny_lora(dropout=0.1)
    make_trainer(tmp_path / "a", plain, schedule="constant", **settings).fit()
    assert not copies.log
    make_trainer(tmp_path / "b", parts, schedule="constant", max_steps=3, **settings, **host).fit()
    assert copies.log
    make_trainer(tmp_path / "b", parts, schedule="constant", **settings, **host).fit(resume=True)
    assert_same_bits(trainable(parts), trainable(plain))


def test_a_layerwise_update_sees_it_too(tmp_path, monkeypatch):
    copies, weights = LateCopies(), []
    monkeypatch.setattr(backends, "copies", lambda device: copies)
    for place in (None, "host"):
        model = tiny_llama()
        config = {"layerwise_update": True, "max_grad_norm": None, "max_steps": 3}
        make_trainer(tmp_path / str(place), model, offload_optimizer=place, **config).fit()
        weights.append(trainable(model))
    assert_same_bits(*weights)


def test_states_that_are_small_stay():
    with pytest.raises(UserError, match="the states of adafactor are a row and a column"):
        TrainConfig(optimizer="adafactor", offload_optimizer="host")
