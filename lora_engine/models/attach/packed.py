"""Hidden states of packed batches: no logits, and the last MLP on the rows that are read only."""

from typing import Protocol, TypedDict

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lora_engine.models.attach.attention import AttentionForward
from lora_engine.models.attach.backbone import BackboneForward, attention_of, takes_read_rows
from lora_engine.models.attach.decoder_layer import DecoderLayerForward
from lora_engine.models.attach.forwards import own_forward
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.attach.sequences import NO_MASK
from lora_engine.models.families.modules import Backbone, BackboneOutput
from lora_engine.models.peft.lora_state import any_has_hooks


class PackedTokens(Protocol):
    """What of a batch the model sees (`lora_engine.data.batch.PackedBatch` has it)."""

    @property
    def input_ids(self) -> Tensor: ...  # [T] int64
    @property
    def position_ids(self) -> Tensor: ...  # [T] int64
    @property
    def cu_seqlens(self) -> Tensor: ...  # [S + 1] int32
    @property
    def parents(self) -> Tensor | None: ...  # [S] int32
    @property
    def max_seqlen(self) -> int: ...


class _OfOurLayers(TypedDict, total=False):
    """Arguments that only layers of ours take."""

    attention_mask: Tensor  # NO_MASK
    sequence_parents: Tensor  # [S] int32
    output_rows: Tensor  # [U] int64


def packed_hidden_states(
    model: nn.Module, batch: PackedTokens, rows: Tensor | None = None
) -> Tensor:
    """The last hidden states [T, H] of a packed batch, after the final norm; no logits.

    `model` is a transformers causal language model, plain, with PEFT adapters, or accelerated.
    Sequences do not see each other, but for what they continue (`parents`). With `rows` [U] int64
    only those, [U, H]; where the last layer has a replaced forward, its MLP runs on them alone.

    Raises ValueError for a batch with `parents` on a model of which `can_share_prefixes` is false.
    """
    backbone = transformers_model(model).base_model
    more: _OfOurLayers = {}
    forward = own_forward(backbone)
    if isinstance(forward, BackboneForward) and forward.needs_no_mask():
        more["attention_mask"] = NO_MASK
    if batch.parents is not None:
        if not can_share_prefixes(model):
            raise ValueError(
                "sequences share prefixes, but the model's attention is not lora_engine's, or it "
                "has dropout: accelerate(model), or collate(examples, share_prefixes=False)"
            )
        more["sequence_parents"] = batch.parents
    pruned = rows is not None and selects_rows(backbone)
    if rows is not None and pruned:
        more["output_rows"] = rows
    output: BackboneOutput = backbone(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
        **more,
    )
    hidden = output.last_hidden_state[0]
    return hidden if rows is None or pruned else hidden.index_select(0, rows)


def hidden_rows(
    backbone: Backbone,
    rows: Tensor,  # [U] int64
    kwargs: dict[str, object],
) -> Tensor:
    """The last hidden states [U, H] of `rows` of the batch [B * L] that `kwargs` describe."""
    wants_states = kwargs.get("output_hidden_states") or backbone.config.output_hidden_states
    pruned = selects_rows(backbone) and not wants_states
    if pruned or takes_read_rows(backbone):
        kwargs = {**kwargs, "output_rows" if pruned else "read_rows": rows}
    output: BackboneOutput = backbone(**kwargs)
    hidden = output.last_hidden_state.flatten(0, 1)
    return hidden if pruned else hidden.index_select(0, rows)


def selects_rows(backbone: Backbone) -> bool:
    """Whether the backbone's last layer takes `output_rows`.

    Not where a hook watches it or a module after it: the hook would see some rows only.
    """
    layers = getattr(backbone, "layers", None)
    if not layers:
        return False
    forward = own_forward(layers[-1])
    if not isinstance(forward, DecoderLayerForward) or not forward.last:
        return False
    before = backbone.get_input_embeddings()
    after = [module for module in backbone.children() if module is not before]
    return not any_has_hooks((backbone, *after, *_modules_of(layers[-1])))


def _modules_of(module: nn.Module) -> list[nn.Module]:
    """The module and all in it, without a generator for each level: a step asks for them."""
    found = [module]
    for each in found:  # which grows
        for child in each._modules.values():
            if child is not None:
                found.append(child)
    return found


def can_share_prefixes(model: nn.Module, *, training: bool | None = None) -> bool:
    """Whether sequences of a batch may share the rows of a common prefix.

    Every layer has to run lora_engine's attention. In training (None: as the model is) dropout
    would draw one mask for all that share.
    """
    layers = getattr(transformers_model(model).base_model, "layers", None) or []
    forwards = [own_forward(attention_of(layer)) for layer in layers]
    replaced = [isinstance(each, AttentionForward) and each.intact() for each in forwards]
    if not replaced or not all(replaced):
        return False
    training = model.training if training is None else training
    return not (training and _has_dropout(model))


def _has_dropout(model: nn.Module) -> bool:
    config = transformers_model(model).config
    return getattr(config, "attention_dropout", 0.0) > 0 or any(
        isinstance(module, _DropoutNd) and module.p > 0 for module in _modules_of(model)
    )
