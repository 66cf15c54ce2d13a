import hashlib

import pytest
import torch
from training_helpers import tiny_lora

from lora_engine.models.attach.accelerate import accelerate, restore
from lora_engine.training.run import fingerprint
from lora_engine.training.run.fingerprint import files_sha256, tensors_sha256, tokenizer_sha256


def test_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_PIECE", 100)
    contents = [b"", b"abc", b"x" * 1001]
    paths = [tmp_path / str(i) for i in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert files_sha256(paths) == [hashlib.sha256(c).hexdigest() for c in contents]


def tensors():
    return {
        "matrix": torch.arange(60.0).view(12, 5),
        "half": torch.arange(7, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "codes": torch.arange(9, dtype=torch.uint8),
    }


def test_neither_order_nor_layout_nor_pieces_matter(monkeypatch):
    expected = tensors_sha256(tensors().items())
    assert tensors_sha256(reversed(tensors().items())) == expected
    strided = torch.full((12, 9), torch.nan)
    strided[:, :5] = tensors()["matrix"]
    assert tensors_sha256({**tensors(), "matrix": strided[:, :5]}.items()) == expected
    for size in (1, 24, 41):
        monkeypatch.setattr(fingerprint, "_PIECE", size)
        assert tensors_sha256(tensors().items()) == expected


@pytest.mark.parametrize("name", ["matrix", "half", "scalar", "codes"])
def test_every_value_counts(name):
    for index in range(tensors()[name].numel()):
        changed = tensors()
        changed[name].view(-1)[index] += 1
        assert tensors_sha256(changed.items()) != tensors_sha256(tensors().items())


def test_names_shapes_and_dtypes_count():
    expected = tensors_sha256(tensors().items())
    for changed in (
        {**tensors(), "matrix": tensors()["matrix"].view(5, 12)},
        {**tensors(), "empty": torch.zeros(0, 5)},
        {**tensors(), "codes": tensors()["codes"].to(torch.int8)},
        {("renamed" if n == "half" else n): t for n, t in tensors().items()},
    ):
        assert tensors_sha256(changed.items()) != expected


def test_an_accelerated_model_has_the_same():
    model = tiny_lora()
    expected = tensors_sha256(model.named_parameters())
    accelerate(model, strict=True)
    assert tensors_sha256(model.named_parameters()) == expected
    restore(model)


class Words:
    def __init__(self, words, special):
        self.words, self.special_tokens_map = words, special

    def get_vocab(self):
        return self.words


def test_tokenizer():
    expected = tokenizer_sha256(Words({"a": 0, "b": 1}, {"eos_token": "b"}))
    assert tokenizer_sha256(Words({"b": 1, "a": 0}, {"eos_token": "b"})) == expected
    assert tokenizer_sha256(Words({"a": 1, "b": 0}, {"eos_token": "b"})) != expected
    assert tokenizer_sha256(Words({"a": 0, "b": 1}, {"eos_token": "a"})) != expected
    tokenizer_sha256(Words({"\udc80": 0}, {}))
