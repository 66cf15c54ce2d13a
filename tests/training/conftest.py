import sys
from pathlib import Path

import pytest
import torch

# training_helpers is shared with fit_worker.py, which runs as a script of its own.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _random_state_of_its_own():
    """fit() seeds the global generators; no test should notice another's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _guarded(poisoned):
    """Every run in this process has poisoned memory and watched products."""
