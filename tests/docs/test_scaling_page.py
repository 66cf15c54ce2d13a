"""docs/scaling.md has what its program prints."""

from pathlib import Path

import pytest

import benchmarks
from benchmarks.gpu import scaling

PAGE = Path(benchmarks.__file__).parents[1] / "docs/scaling.md"


@pytest.mark.slow
def test_the_table_is_the_models():
    assert scaling.table() in PAGE.read_text(encoding="utf-8")


def test_what_links_cost():
    """Adapters' gradients once around; a sharded base once a pass, less what is computed."""
    pair = scaling.Cluster("rtx-4090", 2, 10e9, "")
    whole = scaling.sizes("1B", None)
    found = scaling.fitting(whole, scaling.GPUS["rtx-4090"])
    reduced = 4 * whole.adapter_values / 7e9
    assert scaling.waiting(pair, whole, found, "replicated", 1.0) == pytest.approx(reduced)
    gathered = whole.weights["linears"] / 7e9  # half of it, twice
    assert scaling.waiting(pair, whole, found, "sharded", 0.1) == pytest.approx(
        reduced + gathered - 0.1
    )
    assert scaling.waiting(pair._replace(count=1), whole, found, "alone", 1.0) == 0
