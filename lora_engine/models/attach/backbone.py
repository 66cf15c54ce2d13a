"""The forward of a model's layers on padded batches: rows of padding are not computed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_engine.models.attach.attention import AttentionForward, window_of
from lora_engine.models.attach.attention_function import (
    computes_padding,
    is_proving,
    weights_if_asked,
    whole_masks,
)
from lora_engine.models.attach.capture import is_idle
from lora_engine.models.attach.forwards import ReplacedForward, own_forward, uncompiled
from lora_engine.models.attach.masks import has_holes
from lora_engine.models.families.modules import Backbone, BackboneOutput
from lora_engine.models.peft.lora_state import autocast_to_another_half, hooks_everywhere
from lora_engine.models.peft.router import AdapterRouter

# Arguments with which the layers see each token by itself or by its place in a sequence.
_PER_TOKEN = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids"})
_HARMLESS = frozenset({"logits_to_keep", "num_items_in_batch", "output_rows", "use_cache"})
# transformers' own hook on the embedding, with which gradients reach checkpointed layers.
_REQUIRES_GRAD = "PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads"


class BackboneForward(ReplacedForward):
    """The forward of the layers under a causal language model's head.

    A padded batch without a cache runs as packed sequences, where attention is lora_engine's in
    every layer, nobody watches the calls, and rows are not routed to adapters. Its
    `last_hidden_state` is [B, L, H] with zeros in the rows of padding; with `output_rows` [U],
    places in the rows of the padded batch, [1, U, H].

    A caller that reads some rows only passes them as `output_rows` or `read_rows` [U]: the batch
    is then packed unless one of them is padding. Otherwise a batch with padding on the left is not
    packed: the label of a row's first token is predicted at the padding before it.
    """

    def __init__(
        self, backbone: Backbone, router: AdapterRouter, own_attention: str | None
    ) -> None:
        self.backbone, self.router, self.own_attention = backbone, router, own_attention
        self.original: Callable[..., BackboneOutput] = backbone.forward
        self.windows = frozenset(_windows(backbone))

    @uncompiled
    def __call__(
        self,
        *args: object,
        read_rows: Tensor | None = None,  # [U] int64
        output_rows: Tensor | None = None,  # [U] int64
        **kwargs: object,
    ) -> BackboneOutput:
        """As the backbone's own."""
        read = output_rows if read_rows is None else read_rows
        padded = None if args or not self._packs(kwargs) else _padded_batch(kwargs, read)
        if output_rows is not None:
            kwargs["output_rows"] = (
                output_rows if padded is None else padded.place.index_select(0, output_rows)
            )
        if padded is None:
            with (
                weights_if_asked(self.backbone.config, self.own_attention, kwargs),
                nullcontext() if self._has_its_windows() else whole_masks(self._own_masks()),
            ):
                return self.original(*args, **kwargs)
        output = self.original(**kwargs | padded.packed)
        if output_rows is None:
            output.last_hidden_state = padded.unpack(output.last_hidden_state[0])
        return output

    def needs_no_mask(self) -> bool:
        """Whether the layers, in their present state, need none for a batch packed already."""
        return (
            not is_proving()
            and not computes_padding()
            and self._has_its_windows()
            and all(map(self._serves, self.backbone.layers))
        )

    def _packs(self, kwargs: Mapping[str, object]) -> bool:
        """Whether the layers, in their present state, compute the same for packed sequences."""
        config = self.backbone.config
        mask = kwargs.get("attention_mask")
        use_cache = kwargs.get("use_cache")
        weight = next(self.backbone.parameters())
        return (
            isinstance(mask, Tensor)
            and mask.dim() == 2
            and not _more_than_tokens(kwargs)
            and not computes_padding()
            and self._has_its_windows()
            and not (getattr(config, "use_cache", False) if use_cache is None else use_cache)
            and not (config.output_hidden_states or config.output_attentions)
            and getattr(config, "return_dict", True)
            and self.router.rows is None
            and not bool(mask.all())
            and not hooks_everywhere()
            and not autocast_to_another_half(weight.device, weight.dtype)
            and all(map(self._serves, self.backbone.layers))
            and not any(
                _is_watched(part) for part in self.backbone.modules() if part is not self.backbone
            )
        )

    def _has_its_windows(self) -> bool:
        """Whether each layer's window is that of its mask, which goes by the layer's place.

        Somebody may have taken layers out, or put them in another order.
        """
        return self.own_attention is None or self.windows.issuperset(_windows(self.backbone))

    def _own_masks(self) -> str:
        return "eager" if self.own_attention == "eager" else "sdpa"

    def _serves(self, layer: nn.Module) -> bool:
        attention = attention_of(layer)
        forward = own_forward(attention)
        return (
            isinstance(forward, AttentionForward)
            and forward.intact()
            and not (attention.training and forward.module.attention_dropout > 0)
        )


@dataclass(frozen=True)
class PaddedBatch:
    """A padded batch, and how it is packed."""

    packed: dict[str, object]  # arguments of the packed batch
    index: Tensor  # [T] the places of the packed tokens in the batch's rows
    place: Tensor  # [B * L] the places of the batch's tokens among the packed
    shape: tuple[int, int]  # B, L

    def unpack(self, hidden: Tensor) -> Tensor:
        """Of packed rows [T, H] the batch's, [B, L, H], with zeros for padding."""
        rows = hidden.new_zeros(len(self.place), hidden.shape[-1])
        return rows.index_copy(0, self.index, hidden).view(*self.shape, -1)


def attention_of(layer: nn.Module) -> nn.Module:
    """A decoder layer's attention; the layer where it has none, as some layers of hybrids."""
    attention: nn.Module | None = getattr(layer, "self_attn", None)
    return layer if attention is None else attention


def _windows(backbone: Backbone) -> Iterator[tuple[object, ...]]:
    """Of each layer: the kind of its mask, the window that masks have, and its own."""
    config = backbone.config
    kinds = getattr(config, "layer_types", None) or ()
    of_masks = getattr(config, "sliding_window", None)
    for i, layer in enumerate(backbone.layers):
        yield kinds[i] if i < len(kinds) else None, of_masks, window_of(attention_of(layer))


def takes_read_rows(backbone: nn.Module) -> bool:
    """Whether the backbone's forward is one that may be told which rows are read."""
    return isinstance(own_forward(backbone), BackboneForward)


class _Tokens(NamedTuple):
    """What of a call's arguments has a value for each token."""

    input_ids: Tensor | None  # [B, L] int64
    inputs_embeds: Tensor | None  # [B, L, H]
    position_ids: Tensor | None  # [B or 1, L] int64


def _tensor(value: object) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _more_than_tokens(kwargs: Mapping[str, object]) -> bool:
    """Whether a call has arguments with which tokens may not be seen by themselves."""
    return any(
        name not in _PER_TOKEN | _HARMLESS and value is not None and value is not False
        for name, value in kwargs.items()
    )


def _padded_batch(
    kwargs: Mapping[str, object],
    read: Tensor | None,  # [U] int64
) -> PaddedBatch | None:
    """None where a row of padding may be read, or padding lies between a row's tokens."""
    arguments = _Tokens(
        _tensor(kwargs.get("input_ids")),
        _tensor(kwargs.get("inputs_embeds")),
        _tensor(kwargs.get("position_ids")),
    )
    attention_mask = _tensor(kwargs.get("attention_mask"))
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    batch, length = mask.shape
    tokens = [x for x in (arguments.input_ids, arguments.inputs_embeds) if x is not None]
    if any(x.shape[:2] != mask.shape for x in tokens) or has_holes(mask):
        return None
    index = mask.flatten().nonzero()[:, 0]
    if read is None:
        unread = bool(mask[:, 0].all())
    else:
        unread = bool(mask.flatten().index_select(0, read).all())
    if not unread or len(index) == 0:
        return None
    place = torch.zeros(batch * length, dtype=torch.int64, device=index.device)
    place[index] = torch.arange(len(index), device=index.device)
    lengths = mask.sum(1)
    lengths = lengths[lengths > 0]
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    positions = arguments.position_ids
    if positions is None:
        positions = torch.arange(length, device=index.device)[None]
    packed: dict[str, object] = {
        "attention_mask": None,
        "position_ids": positions.expand(batch, length).reshape(-1)[index][None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
    if arguments.input_ids is not None:
        packed["input_ids"] = arguments.input_ids.flatten(0, 1).index_select(0, index)[None]
    if arguments.inputs_embeds is not None:
        packed["inputs_embeds"] = arguments.inputs_embeds.flatten(0, 1).index_select(0, index)[None]
    return PaddedBatch(packed=packed, index=index, place=place, shape=(batch, length))


def _is_watched(module: nn.Module) -> bool:
    """Whether a foreign hook would see the module's packed rows, or its forward was replaced."""
    forward = own_forward(module)
    if forward is not None and not type(forward).__module__.startswith("lora_engine."):
        return True
    hooks = [
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *module._backward_hooks.values(),
    ]
    return not all(
        getattr(hook, "__qualname__", "") == _REQUIRES_GRAD or is_idle(hook) for hook in hooks
    )
