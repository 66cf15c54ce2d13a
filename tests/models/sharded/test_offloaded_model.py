"""Models whose frozen linears wait on disk: the same bits, and memory that they do not take."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from late_copies import LateCopies
from pydantic import ValidationError
from safetensors.torch import save_file
from training_helpers import assert_same_bits, make_trainer, tiny_llama, trainable
from transformers import LlamaConfig, LlamaForCausalLM

import lora_engine
from lora_engine import backends
from lora_engine.app.config import RunConfig
from lora_engine.app.run_model import run_model
from lora_engine.distributed.world import World
from lora_engine.errors import UserError
from lora_engine.memory.measured import peak_cpu_bytes
from lora_engine.models.load.load import load_model
from lora_engine.models.sharded.linear import ShardedLinear
from lora_engine.ops import StoredWeight, sharded_weight
from lora_engine.testing import byte_tokenizer, with_lora
from lora_engine.training.run.identity import model_weights_sha256

WORKER = Path(__file__).parents[2] / "support" / "offload_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def loaded(folder, place=None, **options):
    """place: a folder on disk; "host"; None: the model is whole in memory."""
    waits = {"offload_host": True} if place == "host" else {"offload_folder": place}
    model, _ = load_model(folder, dtype="float32", **waits, **options)
    return model


@pytest.fixture
def late(monkeypatch):
    copies = LateCopies()
    monkeypatch.setattr(backends, "copies", lambda device: copies)
    return copies


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
@pytest.mark.parametrize("engine", [True, False], ids=["accelerated", "plain"])
@pytest.mark.parametrize("place", ["disk", "host"])
def test_a_run_has_the_same_weights(folder, tmp_path, format, engine, place, late):
    """Bitwise of packed bits; dense products take other paths: to float32's rounding."""
    weights = []
    for scratch in (None, tmp_path if place == "disk" else "host"):
        model = with_lora(loaded(folder, scratch, quantize=format))
        if engine:
            lora_engine.accelerate(model, strict=True)
        make_trainer(tmp_path / f"run{len(weights)}", model, final_weights="last").fit()
        weights.append(trainable(model))
    if format is not None:
        assert_same_bits(*weights)
    for name, values in weights[0].items():
        torch.testing.assert_close(weights[1][name], values, rtol=1e-3, atol=1e-5)


def test_every_wait_for_a_weight_is_needed(folder, monkeypatch):
    def losses(forget):
        copies = LateCopies(forget)
        monkeypatch.setattr(backends, "copies", lambda device: copies)
        monkeypatch.setattr(sharded_weight, "_gatherers", {})  # a late copy is for this run alone
        model = loaded(folder, "host")
        ids = torch.arange(16)[None]
        with torch.no_grad():
            return [model(input_ids=ids, labels=ids).loss.item() for _ in range(2)], copies

    expected, copies = losses(None)
    assert all(value == expected[0] < 10 for value in expected)
    assert copies.waits == len(copies.sources) - 1 >= 27  # the next one is on its way
    ahead = copies.log[-20:]  # a group is begun before the one before it is computed with
    assert ahead == [step for n in range(18, 28) for step in (f"wait {n}", f"begin {n + 1}")]
    for forget in range(copies.waits):
        assert losses(forget)[0] != expected


def test_weights_on_the_host_are_the_same_and_named(folder):
    model, whole = loaded(folder, "host"), loaded(folder)
    stored = {n: m for n, m in model.named_modules() if isinstance(m, ShardedLinear)}
    assert len(stored) == 14 and "in the host's memory" in repr(model)
    for name, linear in stored.items():
        assert torch.equal(linear.dequantize(), whole.get_submodule(name).weight)


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
    with pytest.raises(ValidationError, match="give one of offload_folder, offload_host, keep"):
        RunConfig.model_validate({**content, "model": {**model, "offload_host": True}})
    content["model"] = {"path": str(folder), "offload_host": True}
    with pytest.raises(ValidationError, match=r"model.offload_host: weights on the host are froz"):
        RunConfig.model_validate({**content, "lora": None})
    with pytest.raises(UserError, match=r"^model.offload_host: is for one process"):
        run_model(RunConfig.model_validate(content), None, World(0, 2))
