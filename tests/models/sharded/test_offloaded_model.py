"""Models whose frozen linears wait on disk: the same bits, and memory that they do not take."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from training_helpers import assert_same_bits, make_trainer, tiny_llama, trainable
from transformers import LlamaConfig, LlamaForCausalLM

import lora_engine
from lora_engine.app.config import RunConfig
from lora_engine.app.run_model import run_model
from lora_engine.distributed.world import World
from lora_engine.errors import UserError
from lora_engine.memory.measured import peak_cpu_bytes
from lora_engine.models.load.load import load_model
from lora_engine.models.sharded.linear import ShardedLinear
from lora_engine.ops import StoredWeight
from lora_engine.testing import byte_tokenizer, with_lora
from lora_engine.training.run.identity import model_weights_sha256

WORKER = Path(__file__).parents[2] / "support" / "offload_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def loaded(folder, scratch=None, **options):
    model, _ = load_model(folder, dtype="float32", offload_folder=scratch, **options)
    return model


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
@pytest.mark.parametrize("engine", [True, False], ids=["accelerated", "plain"])
def test_a_run_has_the_same_weights(folder, tmp_path, format, engine):
    """Bitwise of packed bits; dense products take other paths: to float32's rounding."""
    weights = []
    for scratch in (None, tmp_path):
        model = with_lora(loaded(folder, scratch, quantize=format))
        if engine:
            lora_engine.accelerate(model, strict=True)
        make_trainer(tmp_path / f"run{len(weights)}", model, final_weights="last").fit()
        weights.append(trainable(model))
    if format is not None:
        assert_same_bits(*weights)
    for name, values in weights[0].items():
        torch.testing.assert_close(weights[1][name], values, rtol=1e-3, atol=1e-5)


def test_every_linear_but_the_head_is_on_disk(folder, tmp_path):
    model = loaded(folder, tmp_path)
    stored = {n: m for n, m in model.named_modules() if isinstance(m, ShardedLinear)}
    assert len(stored) == 14 and "lm_head" not in stored
    assert all(isinstance(m.sharded, StoredWeight) for m in stored.values())
    assert "on disk" in repr(model)
    whole = loaded(folder)
    name, linear = next(iter(stored.items()))
    assert torch.equal(linear.dequantize(), whole.get_submodule(name).weight)
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_other_weights_are_another_model(folder, tmp_path):
    path = tmp_path / "other"
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    models = [loaded(each, tmp_path) for each in (folder, folder, path)]
    first, again, other = map(model_weights_sha256, models)
    assert first == again != other


def save_llama(path, dtype, **extents):
    """A random Llama in files of a layer each: it is never whole in memory."""
    config = LlamaConfig(**extents, dtype=dtype, tie_word_embeddings=True)
    config.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    files, draws = {}, torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", []).append((name, shape))
    for file, members in files.items():
        tensors = {
            name: (torch.randn(shape, generator=draws) * 0.02).to(dtype)
            if len(shape) > 1
            else torch.ones(shape, dtype=dtype)
            for name, shape in members
        }
        save_file(tensors, path / file)
    index = {"weight_map": {n: file for file, of in files.items() for n, _ in of}}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, **index}))


def test_linears_take_the_memory_of_two(tmp_path):
    """Of torch's allocator, in the bytes of all linears: two slots for the largest group, and
    what the step makes. In memory they take all of it, and again what accelerate makes of them."""
    extents = {**SMALL, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8}
    save_llama(tmp_path / "model", torch.float32, **extents)
    linears = 8 * 4 * (256 * (256 + 256 + 128 + 128) + 3 * 256 * 704)

    def peak(scratch):
        held = {}

        def train():
            model = held["model"] = with_lora(loaded(tmp_path / "model", scratch), r=2)
            lora_engine.accelerate(model)
            ids = torch.arange(16)[None]
            model(input_ids=ids, labels=ids).loss.backward()

        return peak_cpu_bytes(train) / linears

    assert peak(tmp_path) < 0.75
    assert peak(None) > 1


def trained_within(megabytes, folder, scratch):
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(folder), str(scratch), str(megabytes)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
BILLION = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("extents", "dtype", "megabytes"),
    [
        pytest.param(SMALL, torch.float32, 130, id="205 MB in 130"),
        pytest.param(BILLION, torch.bfloat16, 1500, id="2.1 GB in 1.5"),
    ],
)
def test_a_model_larger_than_memory_trains(tmp_path, extents, dtype, megabytes):
    save_llama(tmp_path / "model", dtype, **extents)
    whole = trained_within(megabytes, tmp_path / "model", "-")
    assert whole.returncode != 0 and "memory" in whole.stderr.lower()
    stored = trained_within(megabytes, tmp_path / "model", tmp_path)
    assert stored.returncode == 0, stored.stderr
    first, second = json.loads(stored.stdout)
    assert second < first


def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'"):
        loaded(folder, tmp_path)


def test_what_cannot_wait_on_disk_is_refused(folder, tmp_path):
    with pytest.raises(OSError, match="No such file or directory: '/nowhere"):
        loaded(folder, "/nowhere")
    model = {"path": str(folder), "offload_folder": str(tmp_path)}
    content = {"model": model, "data": {"train": "x"}}
    with pytest.raises(ValidationError, match=r"model.offload_folder: weights on disk are frozen"):
        RunConfig.model_validate({**content, "lora": None})
    with pytest.raises(UserError, match=r"^model.offload_folder: is for one process"):
        run_model(RunConfig.model_validate(content), None, World(0, 2))
