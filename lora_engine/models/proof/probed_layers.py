"""A model's repeated layers while it is tried: each replaced forward gets its own forward's input.

Layers that differ only in their weights and their place are of one kind. The first of a kind runs
and the others return their input; the last layer of a list, which may be told to compute some rows
alone, also runs where that is asked for. A run with transformers'
forwards records the input and the output of each layer. In a run with replaced forwards, each layer
reads the recorded input and passes the recorded output on, so that layers are compared one by one
and rounding does not add up from layer to layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps

import torch
from torch import Tensor, nn

from lora_engine.models.proof.closeness import HALF, coarsest_dtype, excess, noise_of
from lora_engine.ops.context import Context

_MOST_PARAMETERS = 2**28  # of a layer that is also run in float32
# Attributes of a module that are compared between two, and those that say its place or its mode.
_SETTINGS = (str, int, float, bool, type(None))
_OF_A_PLACE = frozenset({"layer_idx", "layer_id", "layer_number", "training"})


@dataclass
class _Call:
    inputs: Tensor  # hidden states that the layer read
    result: Tensor  # hidden states that its own forward made of them
    exact: Tensor | None  # the result in float32, where the layer computes in less


@dataclass
class _Layer:
    name: str
    module: nn.Module
    stands_in: "_Layer | None"  # the layer of its kind that runs in its place; None: it runs
    first: "_Layer | None"  # the first layer of its kind; None: it is the first
    last: bool  # of its list
    noise: float | None = None  # relative error of its own forward in half precision
    calls: list[_Call] = field(default_factory=list)
    replayed: int = 0
    running: bool = False  # its own forward in float32, whose calls are not recorded


class ProbedLayers:
    """The layers of a model's lists, with the recorded calls of their own forwards.

    problem: what the first difference in a replay was, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(_layers(model))
        self.dtype = coarsest_dtype(model)
        self.problem: str | None = None
        self._mask: Tensor | None = None
        self._exact = self._last = False

    @contextmanager
    def recording(self, *, exact: bool = False, last: bool = False) -> Iterator[None]:
        """Within, the layers' inputs and outputs for one batch are recorded.

        exact: the first layer of each kind also runs in float32, if it computes in half precision.
        last: the last layers of lists run, whatever their kind.
        """
        self._exact, self._last = exact, last
        with self._forwards(self._record):
            yield

    @contextmanager
    def replaying(self, mask: Tensor | None = None, *, last: bool = False) -> Iterator[None]:
        """Within, the layers' forwards are compared with those recorded for the next batch, in the
        rows that are no padding. `last` is that of the recording."""
        self._mask, self._last = mask, last
        with self._forwards(self._replay):
            yield

    def rewind(self) -> None:
        """Makes the next replay that of the first batch, and forgets the problem."""
        self.problem = None
        for layer in self.layers:
            layer.replayed = 0

    @contextmanager
    def _forwards(self, run: Callable[..., object]) -> Iterator[None]:
        before = [vars(layer.module).get("forward") for layer in self.layers]
        for layer in self.layers:
            own = layer.module.forward
            object.__setattr__(layer.module, "forward", wraps(own)(partial(run, layer, own)))
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, before, strict=True):
                if forward is None:
                    object.__delattr__(layer.module, "forward")
                else:
                    object.__setattr__(layer.module, "forward", forward)

    def _passes(self, layer: _Layer) -> bool:
        """Whether the layer returns its input, as another of its kind runs in its place."""
        runs = layer.last and self._last
        return not runs and layer.stands_in is not None and bool(layer.stands_in.calls)

    def _record(
        self, layer: _Layer, own: Callable[..., object], *args: object, **kwargs: object
    ) -> object:
        hidden = _hidden(args, kwargs)
        if layer.running or hidden is None:
            return own(*args, **kwargs)
        if self._passes(layer):
            return hidden
        inputs = hidden.detach().clone()
        exact = (
            self._in_float32(layer, args, kwargs) if self._exact and layer.first is None else None
        )
        result = own(*args, **kwargs)
        out = _output(result)
        if out is not None and out.shape == inputs.shape:
            if not isinstance(result, Tensor):  # nothing is known of the rest of a tuple
                for other in self.layers:
                    other.stands_in = None if other.stands_in is layer else other.stands_in
            if exact is not None:
                layer.noise = noise_of(out, exact)
            layer.calls.append(_Call(inputs, out.detach().clone(), exact))
        return result

    def _replay(
        self, layer: _Layer, own: Callable[..., object], *args: object, **kwargs: object
    ) -> object:
        hidden = _hidden(args, kwargs)
        if hidden is not None and self._passes(layer):
            return hidden
        if hidden is None or layer.replayed >= len(layer.calls):
            return own(*args, **kwargs)
        call = layer.calls[layer.replayed]
        layer.replayed += 1
        self._note(
            f"what {layer.name} is given", excess(hidden, call.inputs, self._mask, self.dtype)
        )
        args, kwargs = _with_hidden(_Forced.apply(hidden, call.inputs), args, kwargs)
        result = own(*args, **kwargs)
        out = _output(result)
        if out is None or out.shape != call.result.shape:  # the rows that the loss reads, say
            return result
        ratio = excess(
            out,
            call.result,
            self._mask,
            self.dtype,
            exact=call.exact,
            inputs=call.inputs,
            noise=(layer.first or layer).noise,
        )
        self._note(layer.name, ratio)
        out = _Forced.apply(out, call.result)
        return (out, *result[1:]) if isinstance(result, tuple) else out

    def _note(self, what: str, ratio: float) -> None:
        if not ratio <= 1 and self.problem is None:
            self.problem = f"a try: {what} differs {ratio:.2g} times as much as rounding explains"

    def _in_float32(
        self, layer: _Layer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor | None:
        """The layer's output by its own forward in float32; None where it has none such."""
        hidden = _hidden(args, kwargs)
        parameters = list(layer.module.parameters())
        if hidden is None or self.dtype not in HALF:
            return None
        if sum(p.numel() for p in parameters) > _MOST_PARAMETERS:
            return None
        state = {name: _wide(value) for name, value in _tensors(layer.module)}
        args = tuple(map(_widened, args))
        kwargs = {key: _widened(value) for key, value in kwargs.items()}
        layer.running = True
        try:
            with torch.no_grad():
                call = torch.func.functional_call
                out = _output(call(layer.module, state, args, kwargs, tie_weights=False))
        except Exception:  # a class that insists on its own type is compared in that
            return None
        finally:
            layer.running = False
        return out if out is not None and out.dtype == torch.float32 else None


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once for every module that has it, by the module's first name.

    Where a module is a part of several (PEFT's banks of vectors), `functional_call` would by itself
    exchange its tensors twice, and leave the exchanged ones in it.
    """
    for prefix, part in module.named_modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, tensor


def _layers(model: nn.Module) -> Iterator[_Layer]:
    """The layers of the model's outermost lists of modules with parts."""
    inside: tuple[str, ...] = ()
    for name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or name.startswith(inside or ("\n",)):
            continue
        inside += (f"{name}.",)
        types = _layer_types(model, len(layers))
        kinds: dict[tuple[object, ...], _Layer] = {}
        for i, module in enumerate(layers):
            if not list(module.children()):
                continue
            kind = (types[i], *kind_of(module))
            first, last = kinds.get(kind), i + 1 == len(layers)
            layer = _Layer(
                name=f"{name}.{i}", module=module, stands_in=first, first=first, last=last
            )
            kinds.setdefault(kind, layer)
            yield layer


def _layer_types(model: nn.Module, count: int) -> list[object]:
    """What the configuration says of each layer of a list as long as its own."""
    config = getattr(model, "config", None)
    types = getattr(config.get_text_config(), "layer_types", None) if config is not None else None
    return list(types) if types is not None and len(types) == count else [None] * count


def kind_of(module: nn.Module) -> tuple[object, ...]:
    """All that two modules of one kind have in common: everything but weights and place."""
    parts: list[object] = []
    for name, part in module.named_modules():
        attributes = vars(part)
        settings = frozenset(
            (key, value)
            for key, value in attributes.items()
            if isinstance(value, _SETTINGS) and key not in _OF_A_PLACE
        )
        own = (*part._parameters.items(), *part._buffers.items())
        shapes = tuple((n, x.shape, x.dtype, x.requires_grad) for n, x in own if x is not None)
        altered = len(part._forward_hooks) + len(part._forward_pre_hooks)
        forward = attributes.get("forward")
        parts.append((name, type(part), settings, shapes, altered, type(forward)))
    return tuple(parts)


def _hidden(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor | None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if isinstance(hidden, Tensor) and hidden.is_floating_point() else None


def _with_hidden(
    hidden: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _output(result: object) -> Tensor | None:
    out = result[0] if isinstance(result, tuple) and result else result
    return out if isinstance(out, Tensor) else None


class _Forced(torch.autograd.Function):
    """The values of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Context[None], x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Context[None], *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _wide(x: Tensor) -> Tensor:
    return x.detach().float() if x.is_floating_point() else x


def _widened(argument: object) -> object:
    if isinstance(argument, dict):
        return {key: _widened(value) for key, value in argument.items()}
    if isinstance(argument, tuple):
        return tuple(_widened(value) for value in argument)
    return _wide(argument) if isinstance(argument, Tensor) else argument
