"""The forward of a model's layers on padded batches: rows of padding are not computed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.errors import UserError
from lora_engine.models.attach.attention import AttentionForward
from lora_engine.models.attach.attention_function import computes_padding, weights_if_asked
from lora_engine.models.attach.capture import is_idle
from lora_engine.models.attach.masks import has_holes
from lora_engine.models.peft.lora_state import autocast_to_another_half, hooks_everywhere
from lora_engine.models.peft.router import AdapterRouter

# Arguments with which the layers see each token by itself or by its place in a sequence.
_PER_TOKEN = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids"})
_HARMLESS = frozenset({"logits_to_keep", "num_items_in_batch", "output_rows", "use_cache"})
# transformers' own hook on the embedding, with which gradients reach checkpointed layers.
_REQUIRES_GRAD = "PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads"


class BackboneForward:
    """The forward of the layers under a causal language model's head.

    A padded batch without a cache runs as packed sequences, where attention is lora_engine's in
    every layer, nobody watches the calls, and rows are not routed to adapters. Its
    `last_hidden_state` is [B, L, H] with zeros in the rows of padding; with `output_rows` [U],
    places in the rows of the padded batch, [1, U, H].

    A caller that reads some rows only passes them as `output_rows` or `read_rows` [U]: the batch
    is then packed unless one of them is padding. Otherwise a batch with padding on the left is not
    packed: the label of a row's first token is predicted at the padding before it.
    """

    def __init__(self, backbone: Any, router: AdapterRouter, own_attention: str | None) -> None:
        self.backbone, self.router, self.own_attention = backbone, router, own_attention
        self.original = backbone.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the backbone's own. UserError within torch.jit.trace, which records no kernels."""
        if torch.jit.is_tracing():
            raise UserError(
                "torch.jit.trace cannot record an accelerated model: call "
                "lora_engine.restore(model) before"
            )
        read = kwargs.pop("read_rows", kwargs.get("output_rows"))
        padded = None if args or not self._packs(kwargs) else _padded_batch(kwargs, read)
        if padded is None:
            with weights_if_asked(self.backbone.config, self.own_attention, kwargs):
                return self.original(*args, **kwargs)
        rows = kwargs.pop("output_rows", None)
        if rows is not None:
            kwargs["output_rows"] = padded.place.index_select(0, rows)
        output = self.original(**kwargs | padded.packed)
        if rows is None:
            output.last_hidden_state = padded.unpack(output.last_hidden_state[0])
        return output

    def _packs(self, kwargs: dict[str, Any]) -> bool:
        """Whether the layers, in their present state, compute the same for packed sequences."""
        config = self.backbone.config
        unknown = {
            name
            for name, value in kwargs.items()
            if name not in _PER_TOKEN | _HARMLESS and value is not None and value is not False
        }
        mask = kwargs.get("attention_mask")
        use_cache = kwargs.get("use_cache")
        return (
            isinstance(mask, Tensor)
            and mask.dim() == 2
            and not unknown
            and not computes_padding()
            and not (getattr(config, "use_cache", False) if use_cache is None else use_cache)
            and not (config.output_hidden_states or config.output_attentions)
            and getattr(config, "return_dict", True)
            and self.router.rows is None
            and not bool(mask.all())
            and not hooks_everywhere()
            and not autocast_to_another_half(next(self.backbone.parameters()))
            and all(map(self._serves, self.backbone.layers))
            and not any(
                _is_watched(part) for part in self.backbone.modules() if part is not self.backbone
            )
        )

    def _serves(self, layer: Any) -> bool:
        attention = attention_of(layer)
        return isinstance(vars(attention).get("forward"), AttentionForward) and not (
            attention.training and attention.attention_dropout > 0
        )


@dataclass(frozen=True)
class PaddedBatch:
    """A padded batch, and how it is packed."""

    packed: dict[str, Any]  # arguments of the packed batch
    index: Tensor  # [T] the places of the packed tokens in the batch's rows
    place: Tensor  # [B * L] the places of the batch's tokens among the packed
    shape: tuple[int, int]  # B, L

    def unpack(self, hidden: Tensor) -> Tensor:
        """Of packed rows [T, H] the batch's, [B, L, H], with zeros for padding."""
        rows = hidden.new_zeros(len(self.place), hidden.shape[-1])
        return rows.index_copy(0, self.index, hidden).view(*self.shape, -1)


def attention_of(layer: Any) -> Any:
    """A decoder layer's attention; the layer where it has none, as some layers of hybrids."""
    attention = getattr(layer, "self_attn", None)
    return layer if attention is None else attention


def takes_read_rows(backbone: Any) -> bool:
    """Whether the backbone's forward is one that may be told which rows are read."""
    return isinstance(vars(backbone).get("forward"), BackboneForward)


def _padded_batch(
    kwargs: dict[str, Any],
    read: Tensor | None,  # [U] int64
) -> PaddedBatch | None:
    """None where a row of padding may be read, or padding lies between a row's tokens."""
    mask = kwargs["attention_mask"].bool()
    batch, length = mask.shape
    tokens = [kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs]
    if any(given is not None and given.shape[:2] != mask.shape for given in tokens):
        return None
    if has_holes(mask):
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
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=index.device)[None]
    packed: dict[str, Any] = {
        "attention_mask": None,
        "position_ids": positions.expand(batch, length).reshape(-1)[index][None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            packed[name] = kwargs[name].flatten(0, 1).index_select(0, index)[None]
    return PaddedBatch(packed, index, place, (batch, length))


def _is_watched(module: nn.Module) -> bool:
    """Whether a foreign hook would see the module's packed rows, or its forward was replaced."""
    forward = vars(module).get("forward")
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
