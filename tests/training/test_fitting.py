"""The largest batches are tried before the first step, and the policy that fits them is taken."""

import pytest
import torch
from processes import Together, run_together
from training_helpers import TRAIN, accelerated, lines, make_trainer, tiny_lora, trainable

from lora_engine import backends
from lora_engine.distributed.world import World, current
from lora_engine.errors import UserError, is_out_of_memory
from lora_engine.training import fitting
from lora_engine.training.batches import BatchSource

NO_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried to "
    "allocate 8589934592 bytes."
)


class Tries:
    """Counts the tries of a policy by the layers that run again, and fails those it is told to."""

    def __init__(self, monkeypatch, *, peaks=(), failing=0):
        self.peaks, self.failing, self.policies = list(peaks), failing, []
        own = fitting.checkpointing

        def noting(model, policy, store):
            self.policies.append(policy)
            if len(self.policies) <= self.failing:
                raise NO_MEMORY
            return own(model, policy, store)

        monkeypatch.setattr(fitting, "checkpointing", noting)
        if peaks:
            monkeypatch.setattr(backends, "peak_memory_bytes", lambda device: self.peaks.pop(0))


def fit(folder, **config):
    model = accelerated(tiny_lora(dropout=0.1))
    make_trainer(folder, model, max_steps=2, **config).fit()
    return trainable(model)


def test_a_run_that_fits_is_the_one_without(tmp_path, monkeypatch):
    plain = fit(tmp_path / "plain")
    tries = Tries(monkeypatch)
    tried = fit(tmp_path / "tried", memory="900GB")
    assert tries.policies == ["none"]
    assert all(torch.equal(plain[name], weight) for name, weight in tried.items())


def test_a_policy_that_keeps_less_is_taken_where_memory_ends(tmp_path, monkeypatch):
    tries = Tries(monkeypatch, failing=3)
    plain = fit(tmp_path / "plain")
    tried = fit(tmp_path / "tried", memory="900GB")
    assert tries.policies == ["none", "every_4", "every_3", "every_2"]
    assert all(torch.equal(plain[name], weight) for name, weight in tried.items())


def test_what_is_taken_is_measured(tmp_path, monkeypatch):
    beyond, within = 2 * 10**9, 5 * 10**8
    tries = Tries(monkeypatch, peaks=[beyond, within] + [within] * 9)
    fit(tmp_path, memory="1GB", checkpointing="selective")
    assert tries.policies == ["selective", "half"]


def test_where_nothing_fits_the_run_does_not_begin(tmp_path):
    message = (
        r"^train.memory 1MB: a step on the largest batch, of \d+ tokens, takes [\d.]+ [MG]B with "
        r"checkpointing layer, and 1 MB may be used; lower train.tokens_per_batch"
    )
    with pytest.raises(UserError, match=message):
        fit(tmp_path, memory="1MB")
    assert lines(tmp_path) == []


def test_another_error_is_not_one_of_memory(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(fitting, "checkpointing", fails)
    with pytest.raises(RuntimeError, match="something else"):
        fit(tmp_path, memory="900GB")
    assert not is_out_of_memory(RuntimeError("something else"))
    assert is_out_of_memory(NO_MEMORY) and is_out_of_memory(MemoryError())


@pytest.mark.slow
def test_layers_that_cannot_be_taken_apart_skip_those_policies(tmp_path, monkeypatch):
    tries = Tries(monkeypatch, failing=4)
    make_trainer(tmp_path, tiny_lora(), max_steps=1, memory="900GB").fit()
    assert tries.policies == ["none", "every_4", "every_3", "every_2", "layer"]


def test_a_policy_that_was_chosen_and_cannot_be_followed_gives_way(tmp_path, monkeypatch):
    tries = Tries(monkeypatch)
    trainer = make_trainer(tmp_path, tiny_lora(), max_steps=1, memory="900GB", checkpointing="half")
    trainer.fit()
    assert tries.policies == ["layer"]


def test_the_largest_batch_has_the_most_tokens():
    source = BatchSource(TRAIN.examples, 40)
    largest = source.largest()
    assert largest.num_tokens == max(batch.num_tokens for batch in source.one_epoch())


@pytest.mark.slow
def test_of_two_processes_each_has_to_fit(tmp_path):
    """The second has no memory for three policies, and both take the fourth."""
    for policies, same in run_together(2, fit_with_and_without, tmp_path, 3):
        assert policies == ["none", "every_4", "every_3", "every_2"]
        assert same


def test_two_processes_that_do_not_fit_end_alike(tmp_path):
    first = Together(2, fit_shared, tmp_path, "1MB").result(0)
    assert isinstance(first, UserError)
    assert str(first).startswith("train.memory 1MB: a step on the largest batch")
    assert lines(tmp_path) == []


def test_processes_that_share_a_model_are_not_tried():
    with pytest.raises(UserError, match=r"^train.memory: is for processes that hold the whole"):
        fitting.fitting_policy(*[None] * 7, World(size=2, in_step=True))


def fit_shared(folder, memory):
    return fit(folder, memory=memory, gradient_accumulation_steps=2)


def fit_with_and_without(folder, failing):
    """What was tried, and whether the weights are those of a run that tries nothing."""
    plain = fit_shared(folder / "plain", None)
    own, policies = fitting.checkpointing, []

    def noting(model, policy, store):
        policies.append(policy)
        if current().rank == 1 and len(policies) <= failing:
            raise NO_MEMORY
        return own(model, policy, store)

    fitting.checkpointing = noting
    tried = fit_shared(folder / "tried", "900GB")
    return policies, all(torch.equal(plain[name], weight) for name, weight in tried.items())
