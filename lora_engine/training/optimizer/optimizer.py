"""What every optimiser over flat parameters does: clip, step, keep its state in files."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from lora_engine import backends, ops
from lora_engine.errors import UserError
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.flat import FlatEntry, FlatParameters
from lora_engine.training.optimizer.flat_state import DeviceState, Flat, HostState
from lora_engine.training.optimizer.rounding import stochastically_rounded

PIECE_STEP = ops.ADAMW_8BIT_BLOCK  # values; pieces of a state on the host begin at multiples


class FlatOptimizer:
    """Updates flat parameters. Subclasses have the rule, and the state that it remembers.

    updates: steps applied so far. torn: whether parameters were updated within a step that has not
        been found sound, as a step that ended in an error with gradients that are not gathered.
    Weight decay applies to all parameters alike. The step is deterministic: the bits that
    bfloat16 weights are rounded by are drawn from seed, step and place.
    """

    by_entry = False  # whether the rule needs a parameter's shape

    def __init__(self, flat: FlatParameters, config: TrainConfig) -> None:
        self.flat = flat
        self.config = config
        self.updates = 0
        self.torn = False
        self.chunk = backends.updated_values(flat.device)
        self._norms: dict[str, torch.Tensor] = {}  # of a layer-wise step's gradients
        self._state: DeviceState | HostState = DeviceState(())

    def stored(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Its state: per file stem of a checkpoint, names to tensors, which may be views."""
        raise NotImplementedError

    def buffers(self) -> list[torch.Tensor]:
        """All that it remembers of gradients, to be read and written."""
        raise NotImplementedError

    def _update(
        self,
        part: slice,
        params: torch.Tensor,  # [n] float32
        grads: torch.Tensor,  # [n] float32
        learning_rate: float,
        norm: torch.Tensor | None,  # []
    ) -> None:
        """The rule, in place, for the elements `part` of the buffers."""
        raise NotImplementedError

    def grad_norm(self) -> torch.Tensor:
        """Euclidean norm of all gradients, [] float32, on the parameters' device."""
        if self.flat.gathered:
            return ops.grad_norm(self.flat.grad)
        if not self._norms:
            return torch.zeros((), device=self.flat.device)
        return torch.linalg.vector_norm(torch.stack(list(self._norms.values())))

    @contextmanager
    def receiving(self, learning_rate: float | None) -> Iterator[None]:
        """Around a backward pass. Where gradients are not gathered, each parameter is updated when
        its gradient arrives, and those that none arrives for with 0; with None nothing is."""
        if self.flat.gathered:
            with self.flat.collecting():
                yield
            return
        self._norms = norms = {}

        def arrived(entry: FlatEntry, gradient: torch.Tensor) -> None:
            if entry.name in norms:
                raise UserError(
                    f"train.layerwise_update: the gradient of {entry.name} arrives in several "
                    "parts, such as reentrant checkpointing makes of a shared one; use "
                    "use_reentrant=False"
                )
            with torch.no_grad():
                norms[entry.name] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
                if learning_rate is not None:
                    grads = _in_order_of(entry, gradient)
                    self._update_entry(entry, grads, learning_rate * entry.rate, None)
                    self.flat.publish_entry(entry)

        if learning_rate is not None:
            self.updates += 1
            self.torn = True
        self.flat.on_arrival = arrived
        try:
            yield
            missing = [entry for entry in self.flat.entries if entry.name not in norms]
            for entry in missing if learning_rate is not None else ():
                arrived(entry, torch.zeros(entry.shape, device=self.flat.device))
        finally:
            self.flat.on_arrival = None

    def nonfinite_gradient(self) -> str | None:
        """The parameter whose gradient was the first that is not finite, of a layer-wise step."""
        return next((name for name, norm in self._norms.items() if not norm.isfinite()), None)

    @torch.no_grad()
    def step(self, learning_rate: float, grad_norm: torch.Tensor) -> None:
        """Apply the gradients in `flat.grad`, whose norm is `grad_norm` [], and publish.

        What clips reads the norm where it lies: nothing waits for a device. Of gradients that are
        not gathered the updates are done; this says that they are sound.
        """
        flat = self.flat
        self.torn = False
        if not flat.gathered:
            return
        self.updates += 1
        norm = None if self.config.max_grad_norm is None else grad_norm
        if flat.by_entry or self.by_entry:
            for entry in flat.entries:
                self._update_entry(entry, flat.grad[entry.part], learning_rate * entry.rate, norm)
        else:
            for part, rate in flat.rates:
                self._update(part, flat.data[part], flat.grad[part], learning_rate * rate, norm)
        flat.publish()

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """`stored` in CPU tensors of their own."""
        self._state.settle()
        return {
            stem: {n: x.detach().to("cpu", copy=True).contiguous() for n, x in named.items()}
            for stem, named in self.stored().items()
        }

    @torch.no_grad()
    def load(self, read: Callable[[str], Mapping[str, torch.Tensor]]) -> None:
        """The inverse of `tensors`; `read` gives a file's by its stem.

        Raises UserError if they are of other parameters.
        """
        self._state.settle()
        for stem, named in self.stored().items():
            tensors = read(stem)
            if {n: x.shape for n, x in tensors.items()} != {n: x.shape for n, x in named.items()}:
                raise UserError(f"{stem}: not the moments of this model's parameters")
            for name, values in named.items():
                values.copy_(tensors[name])

    def _zeros(
        self, shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """A tensor of the state: on the parameters' device, or on the host as configured."""
        if self.config.offload_optimizer is None:
            return torch.zeros(shape, dtype=dtype, device=self.flat.device)
        like = torch.empty(shape, dtype=dtype, device="meta")
        return backends.copies(self.flat.device).host(like).zero_()

    def _keep(self, *tensors: torch.Tensor | Flat) -> None:
        """Says of which flat tensors of `_zeros` the state is, in the order of `_pieces`."""
        state = [t if isinstance(t, Flat) else Flat(t) for t in tensors]
        if self.config.offload_optimizer is None:
            self._state = DeviceState(state)
        else:
            copies, device = backends.copies(self.flat.device), self.flat.device
            size = min(self.chunk // 4, -(-self.flat.data.numel() // PIECE_STEP) * PIECE_STEP)
            self._state = HostState(state, copies, device, size)

    def _pieces(self, part: slice) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """The part in pieces, as slices of it, each with its state on the device."""
        for piece, state in self._state.pieces(part):
            yield slice(piece.start - part.start, piece.stop - part.start), state

    def _update_entry(
        self,
        entry: FlatEntry,
        grads: torch.Tensor,  # [n] float32
        learning_rate: float,
        norm: torch.Tensor | None,
    ) -> None:
        for part in self._chunks(entry.part):
            own = slice(part.start - entry.offset, part.stop - entry.offset)
            with self._writing(self.flat.data[part], part.start) as params:
                self._update(part, params, grads[own], learning_rate, norm)

    def _chunks(self, part: slice) -> Iterator[slice]:
        for start in range(part.start, part.stop, self.chunk):
            yield slice(start, min(start + self.chunk, part.stop))

    @contextmanager
    def _writing(self, values: torch.Tensor, place: int) -> Iterator[torch.Tensor]:
        """A part of `flat.data` in float32, to be written; bfloat16 is rounded at random then.

        place: of its first element in the buffer, which tells one part's draws from another's.
        """
        if values.dtype == torch.float32:
            yield values
            return
        wide = values.float()
        yield wide
        values.copy_(stochastically_rounded(wide, (self.config.seed, self.updates, place)))

    def _clipping(self, norm: torch.Tensor | None) -> torch.Tensor | float:
        """What multiplies gradients of that norm."""
        most = self.config.max_grad_norm
        return 1.0 if norm is None or most is None else (most / norm).clamp(max=1)


def _in_order_of(entry: FlatEntry, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient [n] in float32, its elements in the order of the buffers."""
    if gradient.dtype == torch.float32 and gradient.stride() == entry.strides[0]:
        return gradient.as_strided((entry.numel,), (1,))
    ordered = torch.empty(entry.numel, device=gradient.device)
    trained = next(i for i, p in enumerate(entry.parameters) if p.requires_grad)
    ordered.as_strided(entry.parameters[trained].shape, entry.strides[trained]).copy_(gradient)
    return ordered
