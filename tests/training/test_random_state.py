import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_engine.training import random_state


def draw():
    """Odd numbers of normals, so that a cached second one is part of the state."""
    return [
        torch.rand(3).tolist(),
        torch.randn(1).item(),
        np.random.standard_normal(),  # noqa: NPY002
        np.random.random(),  # noqa: NPY002
        random.gauss(0, 1),
        random.random(),
    ]


def test_continues_alike_after_files(tmp_path):
    random_state.seed_all(3)
    draw()
    tensors, rest = random_state.capture()
    save_file(tensors, tmp_path / "random.safetensors")
    text = json.dumps(rest)
    expected = draw()
    random_state.seed_all(9)
    random_state.restore(load_file(tmp_path / "random.safetensors"), json.loads(text))
    assert draw() == expected


def test_seeds_decide():
    random_state.seed_all(1)
    first = draw()
    random_state.seed_all(2)
    other = draw()
    random_state.seed_all(1)
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("seed", "step", "index"), [(0, 0, 0), (3, 7, 1), (2**31 - 1, 9, 0)])
def test_a_micro_batch_is_seeded_as_torch_seeds(seed, step, index, monkeypatch):
    word = np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(word))
    expected = torch.rand(3)
    monkeypatch.setattr("traceback.format_stack", None)  # no text of the stack for each batch
    random_state.seed_micro_batch(seed, step, index)
    assert torch.equal(torch.rand(3), expected)
