"""AdamW over flat parameters."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypedDict

import torch

from lora_engine import ops
from lora_engine.errors import UserError, nearest
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.flat import FlatParameters

BLOCK = ops.ADAMW_8BIT_BLOCK


class _Step(TypedDict):
    """What all parameters' steps have in common, as `ops.adamw_` takes it."""

    step: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_norm: torch.Tensor | None
    max_grad_norm: float | None


class _Moment(NamedTuple):
    """One of the two moments, by its file's stem."""

    name: str
    values: torch.Tensor  # [P]
    absmax: torch.Tensor | None = None  # [ceil(P / 256)], of values that are codes


class FlatAdamW:
    """AdamW (Loshchilov & Hutter 2019), clipping by global norm, one launch for each rate.

    exp_avg, exp_avg_sq [P] float32: the moments, laid out as `flat.data`. With the optimizer
        "adamw_8bit", uint8 codes, of which 256 in a row share a float32 in exp_avg_absmax and
        exp_avg_sq_absmax [ceil(P / 256)], whatever parameters they belong to.
    updates: steps applied so far, which the bias correction counts.
    Weight decay applies to all parameters alike. The step is deterministic.
    """

    def __init__(self, flat: FlatParameters, config: TrainConfig) -> None:
        self.flat = flat
        self.quantized = config.optimizer == "adamw_8bit"
        dtype = torch.uint8 if self.quantized else flat.data.dtype
        self.exp_avg = torch.zeros_like(flat.data, dtype=dtype)
        self.exp_avg_sq = torch.zeros_like(flat.data, dtype=dtype)
        if self.quantized:
            blocks = -(-flat.data.numel() // BLOCK)
            self.exp_avg_absmax = flat.data.new_zeros(blocks)
            self.exp_avg_sq_absmax = flat.data.new_zeros(blocks)
        self.updates = 0
        self._config = config

    def grad_norm(self) -> torch.Tensor:
        """Euclidean norm of all gradients, [] float32, on the parameters' device."""
        return ops.grad_norm(self.flat.grad)

    def step(self, learning_rate: float, grad_norm: torch.Tensor) -> None:
        """Apply the gradients in `flat.grad`, whose norm is `grad_norm` [], and publish.

        The kernel reads the norm that it clips by where it lies: nothing waits for a device.
        """
        config, flat = self._config, self.flat
        self.updates += 1
        step: _Step = {
            "step": self.updates,
            "beta1": config.beta1,
            "beta2": config.beta2,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "grad_norm": None if config.max_grad_norm is None else grad_norm,
            "max_grad_norm": config.max_grad_norm,
        }
        for part, rate in flat.rates:
            lr = learning_rate * rate
            params, grads = flat.data[part], flat.grad[part]
            moments = self.exp_avg[part], self.exp_avg_sq[part]
            if self.quantized:
                blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
                absmax = self.exp_avg_absmax[blocks], self.exp_avg_sq_absmax[blocks]
                ops.adamw_8bit_(params, grads, *moments, *absmax, lr=lr, **step)
            else:
                ops.adamw_(params, grads, *moments, lr=lr, **step)
        flat.publish()

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The moments as files want them: per file stem, names to CPU tensors.

        One tensor per parameter in float32; in 8 bits, where blocks take no notice of parameters,
        the flat codes and what scales them.
        """
        moments = {}
        for name, values, absmax in self._moments():
            if absmax is None:
                moments[name] = self.flat.named_copies(values)
            else:
                parts = {"codes": values, "absmax": absmax}
                moments[name] = {part: x.detach().to("cpu", copy=True) for part, x in parts.items()}
        return moments

    @torch.no_grad()
    def load(self, read: Callable[[str], Mapping[str, torch.Tensor]]) -> None:
        """The inverse of `tensors`; `read` gives a file's by its stem.

        Raises UserError if they are of other parameters.
        """
        for name, values, absmax in self._moments():
            tensors = read(name)
            if absmax is None:
                self.flat.load_named(values, tensors)
                continue
            for part, x in (("codes", values), ("absmax", absmax)):
                if part not in tensors or tensors[part].shape != x.shape:
                    raise UserError(f"{name}: not the 8-bit moments of this model's parameters")
                x.copy_(tensors[part])

    def buffers(self) -> list[torch.Tensor]:
        """All that it remembers of gradients, to be read and written."""
        parts = [part for _, *moment in self._moments() for part in moment]
        return [part for part in parts if part is not None]

    def _moments(self) -> tuple[_Moment, _Moment]:
        if not self.quantized:
            return _Moment("exp_avg", self.exp_avg), _Moment("exp_avg_sq", self.exp_avg_sq)
        return (
            _Moment("exp_avg", self.exp_avg, self.exp_avg_absmax),
            _Moment("exp_avg_sq", self.exp_avg_sq, self.exp_avg_sq_absmax),
        )


def rate_of(config: TrainConfig) -> Callable[[str], float]:
    """What multiplies the learning rate of a parameter, by its name in a PEFT model."""

    def rate(name: str) -> float:
        parts = name.split(".")
        is_b = any(part in ("lora_B", "lora_embedding_B") for part in parts)
        own = config.adapter_learning_rates
        # An adapter's name follows that of the PEFT container that holds its tensors.
        held = (b for a, b in pairwise(parts) if a.startswith("lora_") or a == "modules_to_save")
        adapter = next((own[part] for part in held if part in own), 1.0)
        return (config.loraplus_lr_ratio if is_b else 1.0) * adapter

    return rate


def check_rates(config: TrainConfig, adapters: Sequence[str]) -> None:
    """Raises UserError if a learning rate is for an adapter that is not among the trained ones."""
    for name in config.adapter_learning_rates:
        if name not in adapters:
            close = nearest(name, adapters)
            there_is = f"there is {', '.join(adapters)}" if adapters else "no adapter is trained"
            raise UserError(
                f"adapter_learning_rates: no adapter {name!r}; "
                + (f"did you mean {close}?" if close else there_is)
            )
