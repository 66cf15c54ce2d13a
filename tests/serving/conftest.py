"""A tiny model, two adapters of it, and a server of the three."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running_server import Running, running
from tiny_model import save_tiny_model

from lora_engine.testing import with_lora

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


def save_adapter(model: Path, folder: Path, seed: int) -> None:
    from transformers import AutoModelForCausalLM

    adapted = with_lora(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), seed=seed)
    with torch.no_grad():  # so that the adapter shows in few tokens
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(10)
    adapted.save_pretrained(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model tiny/ and its adapters one/ and two/."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("served")
    save_tiny_model(place / "tiny")
    save_adapter(place / "tiny", place / "one", 1)
    save_adapter(place / "tiny", place / "two", 2)
    return place


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[Running]:
    """For tests that leave it as it was."""
    with running(models / "tiny", f"one={models / 'one'}", f"two={models / 'two'}") as found:
        yield found
