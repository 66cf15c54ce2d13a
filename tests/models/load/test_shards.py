"""Safetensors files tensor by tensor, and what is wrong with some."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_engine import UserError
from lora_engine.models.load.shards import INDEX, SINGLE, Shards


def written(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes in the folder's one file."""
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "none": torch.empty(0, 7),
        "one": torch.tensor(3.0),
        "bytes": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
        "whole": torch.tensor([2**40]),
    }
    save_file(tensors, folder / SINGLE)
    return tensors


def test_tensors_are_those_written(tmp_path: Path) -> None:
    tensors = written(tmp_path)
    shards = Shards(tmp_path)
    assert shards.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        read = shards.read(name)
        assert read.dtype == expected.dtype and read.shape == expected.shape
        assert torch.equal(
            read.view(torch.uint8) if read.dim() else read,
            expected.view(torch.uint8) if expected.dim() else expected,
        )


def test_several_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "2.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert torch.equal(Shards(tmp_path).read("b"), torch.zeros(2))
    index["weight_map"]["c"] = "1.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"1\.safetensors: lacks c, which .* says it has"):
        Shards(tmp_path)
    index["weight_map"] = {"a": "3.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"3\.safetensors: no such file"):
        Shards(tmp_path)


@pytest.mark.parametrize("index", ["[", "{}", '{"weight_map": 1}', '{"weight_map": {"a": "../x"}}'])
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    written(tmp_path)
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(UserError, match=f"{INDEX}: "):
        Shards(tmp_path)


def test_a_file_cut_short(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / SINGLE
    whole = path.read_bytes()
    for size, match in (
        (len(whole) - 1, "ends after .* bytes, within"),
        (40, "ends within its header"),
        (4, "is no safetensors file"),
        (0, "is no safetensors file"),
    ):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"model\.safetensors: {match}"):
            Shards(tmp_path)


def test_a_file_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    written(tmp_path)
    shards = Shards(tmp_path)
    last = max(shards.tensors, key=lambda name: shards.tensors[name].start)
    os.truncate(tmp_path / SINGLE, shards.tensors[last].start + 1)
    with pytest.raises(UserError, match=f"ends within {last}; get the complete file"):
        shards.read(last)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}},
        {"a": 3},
        [],
    ],
    ids=str,
)
def test_a_header_that_says_nonsense(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(UserError, match="is no safetensors file"):
        Shards(tmp_path)
