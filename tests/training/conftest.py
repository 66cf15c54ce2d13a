import pytest
import torch


@pytest.fixture(autouse=True)
def _random_state_of_its_own():
    """fit() seeds the global generators; no test should notice another's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _guarded(poisoned):
    """Every run in this process has poisoned memory and watched products."""
