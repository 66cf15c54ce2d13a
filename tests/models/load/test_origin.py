"""A model's base in names that others can look up."""

import hashlib

import pytest
from safetensors.torch import save_file
from torch import ones

from lora_engine.models.load.origin import Base, base_of, write_converted_from
from lora_engine.testing import tiny_llama, with_lora

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def model():
    return tiny_llama()


def named(model, name):
    model.name_or_path = str(name)
    return model


@pytest.mark.parametrize("name", [HUB_ID, "gpt2"])
def test_hub_id_and_revision(model, name):
    model.config._commit_hash = "0123abc"
    assert base_of(with_lora(named(model, name))) == Base(name, name, "0123abc")


def test_snapshot_in_the_hubs_cache_is_the_hub_id(model, tmp_path):
    folder = tmp_path / "hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/77aa"
    folder.mkdir(parents=True)
    assert base_of(named(model, folder)) == Base(HUB_ID, HUB_ID, "77aa")


def test_local_folder_is_its_name_and_the_hashes_of_its_weights(model, tmp_path, monkeypatch):
    folder = tmp_path / "private" / "my model"
    folder.mkdir(parents=True)
    save_file({"x": ones(3)}, folder / "model-2.safetensors")
    (folder / "model-1.safetensors").write_bytes(b"one")
    (folder / "notes.txt").write_text("no weights")
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }
    assert base_of(named(model, folder)) == Base("my model", files=expected)
    monkeypatch.chdir(folder)
    assert base_of(named(model, ".")).name == "my model"


def test_weights_that_cannot_be_read_have_no_hash(model, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/model.safetensors").symlink_to(tmp_path / "gone")
    assert base_of(named(model, tmp_path / "tiny")).files == {"model.safetensors": ""}


@pytest.mark.parametrize("hub_id", [HUB_ID, None])
def test_converted_folder_is_the_file_it_was_made_of(model, tmp_path, hub_id):
    source, folder = tmp_path / "smol.Q4_1.gguf", tmp_path / ".cache/smol-0123-float32"
    source.write_bytes(b"GGUF")
    folder.mkdir(parents=True)
    write_converted_from(folder, source, hub_id)
    sha256 = hashlib.sha256(b"GGUF").hexdigest()
    expected = Base(hub_id or "smol.Q4_1.gguf", hub_id, files={"smol.Q4_1.gguf": sha256})
    assert base_of(named(model, folder)) == expected


def test_nothing_of_a_path_that_is_gone_but_its_name(model):
    assert base_of(named(model, "/home/someone/models/tiny")) == Base("tiny")
    assert base_of(named(model, "")) == Base("")
