"""Saving accelerated models with the tools that people have for it: no weight is left out."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, load_model, save_model

import lora_engine
from lora_engine.testing import tiny_llama, with_lora


def model_of() -> Any:
    return with_lora(tiny_llama(vocab_size=97, layers=2), init_lora_weights=False)


@pytest.fixture
def accelerator() -> Iterator[accelerate.Accelerator]:
    yield accelerate.Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_equal(saved: dict[str, torch.Tensor], model: Any) -> None:
    expected = model.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("way", ["save_model", "save_state"])
def test_accelerate_saves_every_weight(
    way: str, tmp_path: Path, accelerator: accelerate.Accelerator
) -> None:
    """To it, tensors of one storage are one tensor under several names."""
    plain = model_of()
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    if way == "save_model":
        accelerator.save_model(model, tmp_path)
    else:
        accelerator.prepare(model)
        accelerator.save_state(tmp_path)
    assert_equal(load_file(tmp_path / "model.safetensors"), plain)


def test_accelerate_loads_a_state(tmp_path: Path, accelerator: accelerate.Accelerator) -> None:
    """It asks safetensors to, which takes no weight that is a part of a storage."""
    plain = model_of()
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    accelerator.prepare(model)
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    accelerator.load_state(tmp_path)
    assert_equal(dict(model.state_dict()), plain)
    ids = torch.arange(11)[None]
    ours, expected = (m.eval()(ids).logits for m in (model, plain))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_safetensors_saves_and_loads_a_model(tied: bool, tmp_path: Path) -> None:
    plain = with_lora(
        tiny_llama(tie_word_embeddings=tied),
        init_lora_weights=False,
        target_modules=["q_proj", "down_proj", *(["lm_head"] if tied else [])],
    )
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    save_model(model, str(tmp_path / "ours"))
    save_model(plain, str(tmp_path / "theirs"))
    ours, theirs = (load_file(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    load_model(model, tmp_path / "theirs")
    assert_equal(dict(model.state_dict()), plain)


@pytest.mark.parametrize("made", ["accelerated", "copied", "pickled"])
def test_tensors_of_a_state_dict_are_the_weights_and_share_no_storage(made: str) -> None:
    model = model_of()
    lora_engine.accelerate(model)
    if made == "copied":
        model = copy.deepcopy(model)
    if made == "pickled":
        model = pickle.loads(pickle.dumps(model))
    for part, prefix in ((model, ""), (model.get_submodule("base_model.model.model"), "model.")):
        state = part.state_dict()
        assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state), prefix
        for name, parameter in part.named_parameters():
            assert state[name].data_ptr() == parameter.data_ptr()
            assert torch.equal(state[name], parameter)
    kept = model.state_dict(keep_vars=True)
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())
    lora_engine.restore(model)
    assert not any(module._state_dict_hooks for module in model.modules())


def test_state_dicts_of_moved_weights() -> None:
    model = model_of()
    lora_engine.accelerate(model)
    assert all(tensor.is_meta for tensor in model.to("meta").state_dict().values())
