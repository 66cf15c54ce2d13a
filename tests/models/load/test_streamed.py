"""Dense folders quantised tensor by tensor: the same model, in little memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_engine
from lora_engine import UserError
from lora_engine.models.load.skeleton import empty_model
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.testing import byte_tokenizer, tiny_llama


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path, **options: Any) -> Any:
    options = {"dtype": "float32", "device": "cpu", **options}
    return lora_engine.load_model(folder, **options)[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_is_the_model_that_transformers_loads(tied: bool, tmp_path: Path) -> None:
    folder = saved(tiny_llama(layers=1, attention_bias=True, tie_word_embeddings=tied), tmp_path)
    model, dense = loaded(folder, quantize="int8"), loaded(folder)
    lora_engine.quantize_model(dense, "int8")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    state, expected = model.state_dict(), dense.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    for (name, buffer), (_, other) in zip(
        model.named_buffers(), dense.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, other), name
    assert model.generation_config == dense.generation_config
    assert {p.requires_grad for p in model.model.norm.parameters()} == {True}
    assert model.config.name_or_path == dense.config.name_or_path == str(folder)


def test_a_base_model_s_folder_has_another_prefix(tmp_path: Path) -> None:
    model = tiny_llama(layers=1, tie_word_embeddings=True)
    folder = saved(model.model, tmp_path)
    packed = loaded(folder, quantize="nf4")
    assert isinstance(packed.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert torch.equal(packed.model.norm.weight, model.model.norm.weight)


def test_experts_that_transformers_joins_go_through_it(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config)
    packed = loaded(saved(model, tmp_path), quantize="nf4")
    assert isinstance(packed.model.layers[0].self_attn.q_proj, QuantizedLinear)
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(packed.model.layers[0].mlp.experts.gate_up_proj, experts.gate_up_proj)


def test_progress_reaches_the_whole(tmp_path: Path) -> None:
    folder = saved(tiny_llama(layers=1), tmp_path)
    told: list[tuple[int, int]] = []
    loaded(folder, quantize="nf4", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 0


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    model.model.layers[0].mlp.up_proj.weight.data[2, 3] = torch.nan
    folder = saved(model, tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors: .*up_proj\.weight has values"):
        loaded(folder, quantize="nf4")


def test_float32_parts_stay_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(layers=1)
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules_strict", {"norm"})
    empty = empty_model(model.config, torch.bfloat16)
    assert empty.model.norm.weight.dtype == torch.float32
    assert empty.model.embed_tokens.weight.dtype == torch.bfloat16
    assert all(p.is_meta for p in empty.parameters())


MEASURE = """
import sys, lora_engine

def kilobytes(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what))

options = {"dtype": "float32", "device": "cpu", "quantize": "nf4"}
lora_engine.load_model(sys.argv[1], **options)
before = kilobytes("VmHWM")
model = lora_engine.load_model(sys.argv[2], **options)
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_packed_model_and_two_tensors(tmp_path: Path) -> None:
    options = {"layers": 4, "vocab_size": 300, "hidden_size": 1024, "intermediate_size": 2816}
    warm = saved(tiny_llama(layers=1), tmp_path / "warm")
    model = tiny_llama(**options)
    folder = saved(model, tmp_path / "model")
    dense = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    lora_engine.quantize_model(model)
    packed = sum(m.quantized.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
    rest = sum(
        p.nbytes
        for m in model.modules()
        if type(m) is not QuantizedLinear
        for p in m.parameters(recurse=False)
    )
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(warm), str(folder)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    allowed = packed + rest + 2 * largest + 12 * 2**20  # and what allocators keep
    assert int(run.stdout) < allowed < dense / 2
