import pytest


@pytest.fixture(autouse=True)
def _guarded(poisoned: None) -> None:
    """Every model runs with poisoned memory and watched products."""
