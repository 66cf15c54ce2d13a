"""What checkpointed layers keep, on disk: the same bits in less memory, and full disks."""

import errno
import os

import pytest
import torch
from test_checkpointing import HIDDEN, POLICIES, TOKENS, step, with_dropout
from training_helpers import TRAIN, assert_same_bits, make_trainer, tiny_lora, trainable

import lora_engine
from lora_engine.data.batch import collate
from lora_engine.data.render import Example
from lora_engine.errors import UserError
from lora_engine.evaluation.batch_loss import batch_loss
from lora_engine.memory.checkpointing import checkpointing
from lora_engine.memory.measured import peak_cpu_bytes
from lora_engine.memory.offload import ActivationStore, DiskActivations
from lora_engine.objectives.sft import SFT
from lora_engine.scratch_file import ScratchFile
from lora_engine.testing import tiny_llama as llama_of
from lora_engine.testing import with_lora
from lora_engine.training.config import TrainConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_bytes_come_back_and_places_are_used_again(tmp_path, dtype):
    file = ScratchFile(tmp_path)
    assert list(tmp_path.iterdir()) == []  # it has no name
    tensors = [torch.randn(n, 3).mul(50).to(dtype) for n in (1, 700, 2000, 0)]
    kept = [file.write(tensor) for tensor in tensors]
    largest = file.nbytes
    for turn in (0, 1):
        for tensor, stored in zip(tensors, kept, strict=True):
            out = torch.empty_like(tensor)
            stored.expect()
            stored.read(out.view(-1).view(torch.uint8))
            assert torch.equal(out, tensor)
        if not turn:
            kept.pop(1)
            del stored
            kept.insert(1, file.write(tensors[1]))
    assert file.nbytes == largest
    del kept[:], stored
    file.write(torch.zeros(largest, dtype=torch.uint8))
    assert file.nbytes == largest  # what was free is one place


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", [True, False], ids=["accelerated", "plain"])
def test_loss_and_gradients_have_the_same_bits(tmp_path, policy, engine):
    if not engine and policy in ("half", "selective"):
        pytest.skip("needs the engine's halves")
    model, batch = with_dropout(), collate(TRAIN.examples[:9])
    if engine:
        lora_engine.accelerate(model, strict=True)
    expected = step(model, batch)
    disk = DiskActivations(tmp_path)
    store = ActivationStore(disk)
    with checkpointing(model, policy, store):
        for _ in range(2):
            assert all(map(torch.equal, step(model, batch), expected))
        size = disk.nbytes
        step(model, batch)
    assert disk.nbytes == size > 0  # no more for more steps


def test_a_second_backward_pass_reads_again(tmp_path):
    model = with_lora(llama_of(vocab_size=61))
    lora_engine.accelerate(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with checkpointing(model, "half", ActivationStore(DiskActivations(tmp_path))):
        loss = batch_loss(model, collate(TRAIN.examples[:9]), SFT()).total
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


def peak_of(layers, policy, store):
    """Of a step, in tensors [tokens, hidden] of float32."""
    model = with_lora(
        llama_of(hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, layers=layers, kv_heads=4)
    )
    lora_engine.accelerate(model)
    ids = torch.randint(97, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = collate([Example(ids, [False] * (TOKENS - 8) + [True] * 8, "made:1")])
    with checkpointing(model, policy, store):
        return peak_cpu_bytes(lambda: step(model, batch)) / (HIDDEN * TOKENS * 4)


@pytest.mark.parametrize("policy", ["layer", pytest.param("half", marks=pytest.mark.slow)])
def test_a_layer_more_costs_no_memory(tmp_path, policy):
    def of_more(store):
        return peak_of(10, policy, store) - peak_of(2, policy, store)

    assert of_more(ActivationStore(DiskActivations(tmp_path))) < 8 * 0.4  # adapters' gradients
    assert of_more(None) > 8 * 0.9


def test_a_run_has_the_same_weights(tmp_path):
    settings = {"checkpointing": "layer", "final_weights": "last"}
    plain, stored = tiny_lora(dropout=0.1), tiny_lora(dropout=0.1)
    make_trainer(tmp_path / "a", plain, **settings).fit()
    make_trainer(tmp_path / "b", stored, offload_activations="disk", **settings).fit()
    assert_same_bits(trainable(stored), trainable(plain))


def test_a_full_disk_ends_the_run_in_a_line_with_the_last_checkpoint_whole(tmp_path, monkeypatch):
    expected, model = tiny_lora(), tiny_lora()
    settings = {
        "checkpointing": "layer",
        "offload_activations": "disk",
        "save_every": 2,
        "final_weights": "last",
    }
    make_trainer(tmp_path / "whole", expected, **settings).fit()
    own, wrote = os.pwritev, []

    def full_after_a_while(*args):
        wrote.append(1)
        if len(wrote) > 9:  # of two layers a step
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return own(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", full_after_a_while)
        with pytest.raises(OSError, match=r"No space left on device: '.*/run'"):
            make_trainer(tmp_path / "run", model, **settings).fit()
    trainer = make_trainer(tmp_path / "run", model := tiny_lora(), **settings)
    assert trainer.folder.checkpoints.newest_sound() == 4
    trainer.fit(resume=True)
    assert_same_bits(trainable(model), trainable(expected))


def test_it_needs_a_policy():
    with pytest.raises(UserError, match="offload_activations is for what checkpointed layers keep"):
        TrainConfig(offload_activations="disk")
