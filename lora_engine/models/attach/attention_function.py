"""Attention as transformers' interfaces want it: an implementation's function, and its masks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_engine import ops
from lora_engine.errors import UserError
from lora_engine.models.attach.forwards import uncompiled
from lora_engine.models.attach.masks import causal_mask, dense_mask, has_holes
from lora_engine.models.attach.sdpa import added_mask, sdpa
from lora_engine.models.attach.sequences import SequenceFinder
from lora_engine.models.families.modules import Config
from lora_engine.models.families.own_functions import eager_attention_of, mask_maker_of

IMPLEMENTATION = "lora_engine"

# Arguments that change attention's result and that are not supported here.
_REFUSED = frozenset({"cache", "head_mask", "position_bias", "s_aux", "sinks", "softcap"})
# Arguments that are supported or do not change attention's result. Layers also pass on a caller's
# arguments for other parts of the model.
_KNOWN = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "is_causal",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_rows",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sequence_parents",
        "sliding_window",
        "use_cache",
    }
)


class _Made(NamedTuple):
    """A mask of `padding_mask` within `proving`, which stands for none where rows are whole."""

    mask: Tensor
    window: int
    stands_for_none: bool


# The masks made within `proving`; None outside.
_masks: ContextVar[list[_Made] | None] = ContextVar("masks", default=None)


@contextmanager
def proving() -> Iterator[None]:
    """Within this context attention also refuses what it accepts unchecked elsewhere.

    That is arguments that it does not know by name, and a layer whose window differs from that of
    its mask, which is what transformers' own attention follows.
    """
    token = _masks.set([])
    try:
        yield
    finally:
        _masks.reset(token)


def is_proving() -> bool:
    """Whether masks and layers are compared."""
    return _masks.get() is not None


def check_window(module: nn.Module, mask: Tensor | None, window: int) -> None:
    masks = _masks.get()
    if masks is None or (mask is not None and mask.dim() != 2):
        return
    windows = [made.window for made in masks if made.mask is mask] if mask is not None else [0]
    if windows != [window]:
        raise UserError(
            f"attention of {type(module).__name__} has a window of {window}, "
            f"its mask {windows[0] if windows else 'an unknown one'}"
        )


def _is_none(mask: Tensor | None) -> bool:
    """Whether a call has no mask, outside of `proving`."""
    made = _masks.get() or ()
    return mask is None or any(each.stands_for_none for each in made if each.mask is mask)


# The implementation of transformers whose masks `padding_mask` makes, within `whole_masks`.
_whole: ContextVar[str | None] = ContextVar("whole_masks", default=None)
# Whether `attend` calls the layers' own eager attention (`weights_if_asked`).
_weights: ContextVar[bool] = ContextVar("weights", default=False)
# Attribute of masks made then: a checkpointed layer runs again after that context has ended.
_OF_WEIGHTS = "_lora_engine_weights"


@contextmanager
def whole_masks(implementation: str) -> Iterator[None]:
    """Within this context masks are those of one of transformers' own implementations.

    Rows of padding are then computed as that implementation computes them.
    """
    token = _whole.set(implementation)
    try:
        yield
    finally:
        _whole.reset(token)


@contextmanager
def weights_if_asked(
    config: Config, own: str | None, arguments: Mapping[str, object]
) -> Iterator[None]:
    """A context for a call of a model: `own` is its own attention.

    Where these or the configuration ask for attention weights, the layers run their eager
    attention, the only implementation that returns them.
    """
    asked = arguments.get("output_attentions")
    if asked is None:
        asked = getattr(config, "output_attentions", False)
    if own != "eager" or not asked:
        yield
        return
    token = _weights.set(True)
    try:
        with whole_masks(own):
            yield
    finally:
        _weights.reset(token)


def computes_padding() -> bool:
    """Whether a caller wants rows of padding computed (`whole_masks`)."""
    return _whole.get() is not None


def register() -> None:
    """Makes `attn_implementation="lora_engine"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)


@uncompiled
def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., object] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
    **kwargs: object,
) -> Tensor | None:
    """The tokens' mask [B, L], or None where every row is one sequence; or sdpa's [B, 1, Q, K].

    In [B, L] padding is 0, and each packed sequence of a row has a number of its own. sdpa's mask
    is returned with a filled cache, and where a mask is not causal with a window and packing.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = mask_function or causal_mask_function
    if device is not None:
        kwargs["device"] = device
    if (whole := _whole.get()) is not None:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        made = mask_maker_of(whole)(
            batch_size,
            q_length,
            kv_length,
            mask_function=function,
            attention_mask=attention_mask,
            **kwargs,
        )
        if made is not None and _weights.get():
            setattr(made, _OF_WEIGHTS, True)
        return made
    known = causal_mask(function)
    # Left to transformers: padding between tokens, since it attends to some of them and counts in
    # windows; and masks of another shape: of one row for all, or longer than the tokens, as where
    # checkpointed layers leave a cache empty.
    is_of_tokens = q_length == kv_length and (
        attention_mask is None
        or (
            attention_mask.shape == (batch_size, kv_length) and not has_holes(attention_mask.bool())
        )
    )
    if is_of_tokens and known is not None:
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if known.sequences is not None:
            numbers = known.sequences.to(torch.int64) + 1
            attention_mask = numbers if attention_mask is None else numbers * attention_mask
        masks = _masks.get()
        if masks is not None:
            stands_for_none = attention_mask is None
            if attention_mask is None:
                attention_mask = torch.ones(batch_size, q_length, device=device)
            attention_mask = attention_mask.clone()
            masks.append(_Made(attention_mask, known.window, stands_for_none))
        return attention_mask
    if known is None:  # sdpa would take "no mask" for a causal one
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        mask_function=function,
        attention_mask=attention_mask,
        **kwargs,
    )


@uncompiled
def attend(
    module: nn.Module,
    query: Tensor,  # [B, Hq, Q, D]
    key: Tensor,  # [B, Hkv, K, D]
    value: Tensor,  # [B, Hkv, K, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,  # [S + 1] int32
    sequence_parents: Tensor | None = None,  # [S] int32
    max_length_q: int | None = None,
    **others: object,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' AttentionInterface wants it, [B, Q, Hq, D].

    Whole sequences, causal or not, run on `ops.attention`. New tokens against a filled cache, other
    masks, dropout and values of another width go to transformers' sdpa, with the same mask. The
    weights [B, Hq, Q, K] come along where they are asked for (`weights_if_asked`). Raises UserError
    for what neither knows, a soft-cap or sinks.
    """
    known = {
        "is_causal": is_causal,
        "sliding_window": sliding_window,
        "cu_seq_lens_q": cu_seq_lens_q,
        "sequence_parents": sequence_parents,
        "max_length_q": max_length_q,
    }
    options = {name: value for name, value in known.items() if value is not None} | others
    refused = [
        name
        for name, value in others.items()
        if value is not None
        and (name in _REFUSED or (_masks.get() is not None and name not in _KNOWN))
    ]
    if refused:
        raise UserError(
            f"attention of {type(module).__name__} is given {', '.join(refused)}, which "
            "lora_engine's does not know: call lora_engine.restore(model)"
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    batch, heads, length, head_dim = query.shape
    if not _is_none(attention_mask) or 0 < (sliding_window or 0) <= length:
        causal = True  # as of a mask that sdpa is given: its `is_causal` speaks where there is none
    if _weights.get() or hasattr(attention_mask, _OF_WEIGHTS):
        plain = eager_attention_of(module)
        mask = added_mask(attention_mask, query, key.shape[2], causal, sliding_window)
        options |= {"scaling": scaling, "dropout": dropout}
        return plain(module, query, key, value, mask, **options)
    whole = length == key.shape[2] and (attention_mask is None or attention_mask.dim() == 2)
    if not whole:
        return sdpa(module, query, key, value, attention_mask, scaling, dropout, **options)
    no_rotation = query.new_zeros(1, length, 0)
    sequences = SequenceFinder()(
        (batch, length),
        (no_rotation, no_rotation),
        attention_mask,
        cu_seq_lens_q,
        sequence_parents,
        max_length_q,
    )
    window = sliding_window or 0
    check_window(module, attention_mask, window)
    ahead = not causal and (window > 0 or sequences.parents is not None)
    if dropout or ahead or value.shape[-1] != head_dim:
        if sequences.parents is not None:
            raise UserError("sequences cannot share prefixes with dropout or other masks")
        mask = dense_mask(
            sequences.cu_seqlens, sequences.token_index, batch, length, causal=causal, window=window
        )
        return sdpa(module, query, key, value, mask.to(query.device), scaling, dropout, **options)
    q, k, v = (x.transpose(1, 2).reshape(batch * length, -1) for x in (query, key, value))
    if sequences.token_index is not None:
        q, k, v = (x[sequences.token_index] for x in (q, k, v))
    out = ops.attention(
        q,
        k,
        v,
        sequences.cu_seqlens,
        head_dim=head_dim,
        softmax_scale=scaling,
        causal=causal,
        window=window,
        parents=sequences.parents,
        equal_lengths=sequences.equal_lengths,
    )
    return unpad(out, sequences.token_index, batch * length).view(
        batch, length, heads, head_dim
    ), None


def unpad(
    out: Tensor,  # [T, N]
    index: Tensor | None,  # [T]
    rows: int,
) -> Tensor:
    """`out` at the places `index` of [rows, N], zeros elsewhere; `out` itself without an index."""
    if index is None:
        return out
    return out.new_zeros(rows, out.shape[-1]).index_copy(0, index, out)
