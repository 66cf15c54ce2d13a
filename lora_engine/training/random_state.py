"""The random number generators of torch, numpy and Python: seed, capture, restore."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import numpy as np
import torch

from lora_engine import backends


class OfNumpy(TypedDict):
    """The state of numpy's global generator beside its key."""

    bit_generator: str
    pos: int
    has_gauss: int
    gauss: float


class OfPython(TypedDict):
    """The state of Python's generator beside its words."""

    version: int
    gauss_next: float | None


class Rest(TypedDict):
    """What of the generators' state is no tensor; JSON."""

    numpy: OfNumpy
    python: OfPython


def seed_all(seed: int) -> None:
    """Seed torch (all devices), numpy's global generator and Python's."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generator is what libraries draw from
    torch.manual_seed(seed)


def seed_micro_batch(seed: int, step: int, index: int) -> None:
    """Seed torch for a micro-batch: its dropout is a function of these three alone, whichever
    process runs it.

    `torch.manual_seed` would keep the stack of calls as text for every kind of device that is not
    in use, which takes longer than the rest of a small step's preparations.
    """
    words = np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(words[0]))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(int(words[0]))


def capture() -> tuple[dict[str, torch.Tensor], Rest]:
    """The state of all generators: tensors for a safetensors file, and the rest as JSON."""
    tensors = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"torch_cuda_{index}"] = state
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(numpy_state, dict)
    tensors["numpy"] = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    version, internal, gauss_next = random.getstate()
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    rest: Rest = {
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "python": {"version": version, "gauss_next": gauss_next},
    }
    return tensors, rest


def restore(tensors: dict[str, torch.Tensor], rest: Rest) -> None:
    """Bring back what `capture` returned. States of GPUs that are not here are left out."""
    torch.set_rng_state(tensors["torch_cpu"])
    for index in range(backends.gpu_count()):
        if (state := tensors.get(f"torch_cuda_{index}")) is not None:
            torch.cuda.set_rng_state(state, index)
    numpy_rest = rest["numpy"]
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": numpy_rest["bit_generator"],
            "state": {
                "key": tensors["numpy"].numpy().astype(np.uint32),
                "pos": numpy_rest["pos"],
            },
            "has_gauss": numpy_rest["has_gauss"],
            "gauss": numpy_rest["gauss"],
        }
    )
    python_rest = rest["python"]
    random.setstate(
        (python_rest["version"], tuple(tensors["python"].tolist()), python_rest["gauss_next"])
    )


@contextmanager
def restored_on_error() -> Iterator[None]:
    """Whatever is raised within leaves the generators as they were."""
    before = capture()
    try:
        yield
    except BaseException:
        restore(*before)
        raise
