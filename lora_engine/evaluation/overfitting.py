"""Where training and held-out loss part: the model learns its examples by heart from there on."""

from collections.abc import Sequence
from typing import NamedTuple

# By how much of itself the held-out loss has to rise, and at how many evaluations in a row: less
# is what steps at random do to it.
_MARGIN = 0.01
_IN_A_ROW = 2


class Measured(NamedTuple):
    """An evaluation. training: mean loss of the steps since the one before; None: there are none.
    heldout: the held-out loss."""

    step: int
    training: float | None
    heldout: float


class Parting(NamedTuple):
    """step: where the held-out loss was lowest. Both losses there, or of the training loss the
    first that was measured, and at the latest evaluation."""

    step: int
    heldout: tuple[float, float]
    training: tuple[float, float]
    seen_at: int

    def __str__(self) -> str:
        rise, fall = self.heldout, self.training
        return (
            f"training and held-out loss part after step {self.step:,}: by step {self.seen_at:,} "
            f"the held-out loss rose from {rise[0]:.4g} to {rise[1]:.4g} while the training loss "
            f"fell from {fall[0]:.4g} to {fall[1]:.4g}; fewer steps, a lower learning rate or more "
            "data overfit less"
        )


def parting(curve: Sequence[Measured]) -> Parting | None:
    """Whether the two part at the end of `curve`, and since when.

    They do if at the last evaluations, more than one, the held-out loss is above its lowest by more
    than a hundredth, and the training loss is below what it was at that lowest.
    """
    if not curve:
        return None
    place = min(range(len(curve)), key=lambda i: curve[i].heldout)
    lowest, later = curve[place], curve[place + 1 :]
    limit = lowest.heldout + _MARGIN * abs(lowest.heldout)
    if len(later) < _IN_A_ROW or any(p.heldout <= limit for p in later[-_IN_A_ROW:]):
        return None
    then = lowest.training if lowest.training is not None else later[0].training
    now = later[-1].training
    if then is None or now is None or now >= then:
        return None
    rise = (lowest.heldout, later[-1].heldout)
    return Parting(step=lowest.step, heldout=rise, training=(then, now), seen_at=later[-1].step)
