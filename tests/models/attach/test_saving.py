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
from safetensors.torch import load_file

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


def test_accelerate_loads_a_state_into_a_restored_model(
    tmp_path: Path, accelerator: accelerate.Accelerator
) -> None:
    model = model_of()
    saved = copy.deepcopy(model)
    lora_engine.accelerate(model)
    accelerator.prepare(model)
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with pytest.raises(RuntimeError, match="None is covering the entire storage"):
        accelerator.load_state(tmp_path)  # safetensors refuses weights that are not contiguous
    lora_engine.restore(model)
    accelerator.load_state(tmp_path)
    assert_equal(dict(model.state_dict()), saved)


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
