"""Where training and held-out loss part, of curves whose parting is plain to see."""

import pytest

from lora_engine.evaluation.overfitting import Measured, parting


def curve(*points: tuple[float | None, float]) -> list[Measured]:
    """An evaluation every ten steps: the training loss before it, and the held-out loss."""
    return [Measured(10 * place, *point) for place, point in enumerate(points)]


def test_they_part_where_the_held_out_loss_was_lowest():
    seen = parting(curve((None, 3.0), (2.5, 2.0), (2.0, 1.5), (1.0, 1.6), (0.5, 1.8)))
    assert seen is not None
    assert (seen.step, seen.seen_at) == (20, 40)
    assert (seen.heldout, seen.training) == ((1.5, 1.8), (2.0, 0.5))
    assert str(seen) == (
        "training and held-out loss part after step 20: by step 40 the held-out loss rose from "
        "1.5 to 1.8 while the training loss fell from 2 to 0.5; fewer steps, a lower learning rate "
        "or more data overfit less"
    )


def test_a_held_out_loss_that_never_fell_parts_at_the_beginning():
    seen = parting(curve((None, 1.0), (2.0, 1.2), (1.0, 1.4)))
    assert seen is not None and seen.step == 0 and seen.training == (2.0, 1.0)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(None, 3.0)],
        [(None, 3.0), (2.0, 2.0), (1.0, 2.5)],
        [(None, 3.0), (2.0, 2.0), (1.0, 2.015), (0.5, 2.019)],
        [(None, 3.0), (2.0, 2.0), (1.0, 2.5), (0.5, 2.0)],
        [(None, 3.0), (2.0, 2.0), (2.1, 2.5), (2.2, 2.6)],
        [(None, 3.0), (2.0, 2.5), (1.0, 2.0), (0.5, 1.5)],
    ],
    ids=[
        *("nothing", "before", "one rise alone", "less than a hundredth", "it came back"),
        *("training rose too", "both fall"),
    ],
)
def test_they_do_not_part(points):
    assert parting(curve(*points)) is None
