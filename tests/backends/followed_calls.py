"""Wrong calls of launchers, which `make lint` has mypy read.

Each is marked as an error, and mypy says so where it finds none: that is, where it does not follow
a call from `ops` to the launcher because a module of kernels has become an `Any`.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from lora_engine.backends import launchers
from lora_engine.backends.contracts import AdamWHyper

if TYPE_CHECKING:

    def wrong_calls(x: Tensor, hyper: AdamWHyper) -> None:
        launchers.glu("cpu").glu_fwd(x, x, activation="silu")  # type: ignore[call-arg]
        launchers.glu("cpu").glu_forward(x, x, x)  # type: ignore[attr-defined]
        launchers.rms_norm("triton").rms_norm_fwd(
            x,
            None,
            x,
            x,
            None,
            "rstd",  # type: ignore[arg-type]
            1e-6,
            0.0,
        )
        launchers.adamw("cuda").adamw(x, x, x, x, hyper, 1.0)  # type: ignore[arg-type]
        launchers.attention("cpu").attention_fwd(x)  # type: ignore[call-arg]
