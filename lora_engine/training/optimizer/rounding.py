"""bfloat16 that is rounded up or down at random, so that small updates count on average."""

from collections.abc import Sequence

import numpy as np
import torch

_DROPPED = 0xFFFF  # the bits of a float32 that a bfloat16 has not


def stochastically_rounded(
    values: torch.Tensor,  # float32
    seed: Sequence[int],
) -> torch.Tensor:
    """`values` in bfloat16: up with the probability of the part that is dropped, else down.

    The expected value is the value (arXiv:2010.06192). The draws are a function of `seed`, the
    shape and the kind of device. What is not finite stays as it is.
    """
    words = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)
    generator = torch.Generator(values.device).manual_seed(int(words[0]))
    draws = torch.randint(
        _DROPPED + 1, values.shape, generator=generator, dtype=torch.int32, device=values.device
    )
    bits = values.contiguous().view(torch.int32)
    rounded = draws.add_(bits).bitwise_and_(~_DROPPED).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
