"""Whole models run on the CPU's kernels, on a GPU, and on Triton's kernels interpreted."""

from collections.abc import Iterator

import pytest
import torch
from gpu_choices import choices_of_a_gpu

from lora_engine import backends


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's model is."""
    if request.param == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def interpreted() -> Iterator[torch.device]:
    """The CPU, with what runs on a GPU: for few tests, since the interpreter takes seconds each."""
    if torch.cuda.is_available():
        pytest.skip("the Triton kernels are compiled for the GPU in this process")
    if not backends.triton_interpreted():
        pytest.skip("triton is not installed")
    with choices_of_a_gpu():
        yield torch.device("cpu")
