"""A model as what its memory depends on: the extents of its layers, and the bytes it holds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from lora_engine.errors import UserError
from lora_engine.models.attach.attention import window_of
from lora_engine.models.attach.backbone import attention_of
from lora_engine.models.families.modules import CausalLm, DecoderLayer, GatedMlp
from lora_engine.models.families.structure import DECODER_CLASSES
from lora_engine.models.peft.adapters import LoraConfig
from lora_engine.models.peft.module_names import check_modules
from lora_engine.models.quantized.quantize import SKIPPED, linears_to_quantize
from lora_engine.ops.lora.base import padded_rank
from lora_engine.quantization.format import Format
from lora_engine.values import accumulate_dtype


@dataclass(frozen=True)
class GroupSizes:
    """Linears that share their input: their outputs, their inputs, and R, all ranks padded."""

    outputs: int
    inputs: int
    rank: int


@dataclass(frozen=True)
class ModelSizes:
    """Extents as docs/glossary.md has them, and bytes that are held from the first step on.

    dtype: of the weights and activations. weights: bytes of the base, by part.
    adapter_values: trained values of adapters, in float32. trained_values: those of the model's
    own tensors, in `dtype`. factored_values: of Adafactor's second moments, N + K for [N, K].
    head, embedding: whether they are trained.
    fused: whether a layer's linears are frozen, so that its halves run as one function each.
    window: of attention; 0: none.
    packed: whether linears are in packed bits, decoded for each product.
    """

    layers: int
    hidden: int
    inner: int
    classes: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    qkv: GroupSizes
    output: GroupSizes
    gate_up: GroupSizes
    down: GroupSizes
    weights: Mapping[str, int] = field(default_factory=dict)
    adapter_values: int = 0
    trained_values: int = 0
    factored_values: int = 0
    head: bool = False
    embedding: bool = False
    fused: bool = True
    dropout: bool = False
    packed: bool = False
    window: int = 0
    head_norms: bool = False

    @property
    def groups(self) -> tuple[GroupSizes, GroupSizes, GroupSizes, GroupSizes]:
        """Of a layer, in the order that they run."""
        return self.qkv, self.output, self.gate_up, self.down

    @property
    def weight_bytes(self) -> int:
        """Of the base, all parts."""
        return sum(self.weights.values())


@dataclass(frozen=True)
class Storing:
    """How linears' weights are kept: packed in `format`, but for those of `skip`; None: dense.

    merge_aware: those with adapters are kept dense as well.
    """

    format: Format | None = None
    skip: str | Sequence[str] = SKIPPED
    merge_aware: bool = False


def sizes_of(
    model: CausalLm,
    lora: LoraConfig | None,
    dtype: torch.dtype,
    storing: Storing = Storing(),
    names: Collection[str] | None = None,
) -> ModelSizes:
    """The sizes of a transformers model, which may be on meta, as it is trained with `lora`.

    lora: None: the parameters `names` are trained, or all of them; what layers keep is then that of
    layers that are trained whole, the most. Raises UserError for a model whose layers are not the
    engine's, and for what `lora` names that is not there.
    """
    layers: list[DecoderLayer] = list(getattr(model.base_model, "layers", None) or [])
    if not layers or any(type(layer).__name__ not in DECODER_CLASSES for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers}) or [type(model).__name__]
        raise UserError(
            f"memory of {', '.join(kinds)} is not modelled; the planner knows "
            f"{', '.join(sorted(DECODER_CLASSES))}"
        )
    ranks = _ranks(model, lora)
    saved = _saved(model, lora)
    first = layers[0]
    attention = first.self_attn
    mlp = first.mlp
    assert isinstance(mlp, nn.Module)
    linears = {
        "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
        "output": (attention.o_proj,),
        "gate_up": (_gated(mlp).gate_proj, _gated(mlp).up_proj),
        "down": (_gated(mlp).down_proj,),
    }
    groups = {name: _group(members, ranks, dtype) for name, members in linears.items()}
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    tied = head is not None and next(head.parameters()) is next(embedding.parameters())
    trained = list(saved.values()) if lora is not None else _trained(model, names)
    whole = {id(parameter) for parameter in trained}
    adapters = sum(rank * sum(_extents(module)) for module, rank in ranks.items())
    merged = set(ranks) if storing.merge_aware else set()
    weights = _weights(model, layers, groups, storing, dtype, tied=tied, merged=merged)
    if lora is not None and saved:  # PEFT trains a copy beside the original
        weights["trained copies"] = sum(p.numel() for p in trained) * dtype.itemsize
    return ModelSizes(
        layers=len(layers),
        hidden=groups["qkv"].inputs,
        inner=groups["down"].inputs,
        classes=_extents(head if head is not None else embedding)[0],
        heads=groups["output"].inputs // attention.head_dim,
        head_dim=attention.head_dim,
        dtype=dtype,
        weights=weights,
        adapter_values=adapters + _biases(model, lora),
        trained_values=sum(p.numel() for p in trained),
        factored_values=_factored(trained, ranks),
        head=head is not None and id(next(head.parameters())) in whole,
        embedding=id(next(embedding.parameters())) in whole,
        fused=lora is not None,
        dropout=lora is not None and any(o.dropout > 0 for o in lora.of_adapters().values()),
        packed=storing.format is not None,
        window=max(window_of(attention_of(layer)) for layer in layers),
        head_norms=hasattr(attention, "q_norm"),
        **groups,
    )


def _gated(mlp: nn.Module) -> GatedMlp:
    assert hasattr(mlp, "gate_proj"), "layers of DECODER_CLASSES have gated MLPs"
    return mlp  # type: ignore[return-value]


def _ranks(model: CausalLm, lora: LoraConfig | None) -> dict[nn.Module, int]:
    """The ranks of all adapters together of each module that gets one."""
    ranks: dict[nn.Module, int] = {}
    for name, own in (lora.of_adapters() if lora is not None else {}).items():
        assert lora is not None
        adapted = check_modules(
            model,
            target_modules=own.target_modules,
            exclude_modules=own.exclude_modules,
            modules_to_save=own.modules_to_save,
            key=lambda field, adapter=name: lora.key(adapter, field),  # type: ignore[misc]
        )
        for module in adapted:
            ranks[module] = ranks.get(module, 0) + own.r
    return ranks


def _trained(model: CausalLm, names: Collection[str] | None) -> list[nn.Parameter]:
    """The parameters of these names, each once; None: all."""
    every = model.named_parameters(remove_duplicate=False)
    found = {id(p): p for name, p in every if names is None or name in names}
    return list(found.values())


def _factored(trained: Sequence[nn.Parameter], ranks: Mapping[nn.Module, int]) -> int:
    """Values of Adafactor's second moments: of a matrix [N, K] N + K, of a vector all."""
    own = sum(p.shape[0] + p.shape[1] if p.dim() == 2 else p.numel() for p in trained)
    return own + sum(2 * rank + sum(_extents(module)) for module, rank in ranks.items())


def _saved(model: CausalLm, lora: LoraConfig | None) -> dict[str, nn.Parameter]:
    """The parameters of modules that are trained in full beside adapters, by name."""
    names = (lora.modules_to_save or []) if lora is not None else []
    return {
        f"{path}.{inner}": parameter
        for path, module in model.named_modules()
        if any(path == name or path.endswith(f".{name}") for name in names)
        for inner, parameter in module.named_parameters()
    }


def _biases(model: CausalLm, lora: LoraConfig | None) -> int:
    """Values of biases that are trained, of all modules or of those with adapters."""
    if lora is None or lora.bias == "none":
        return 0
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))


def _group(
    members: Sequence[nn.Module], ranks: Mapping[nn.Module, int], dtype: torch.dtype
) -> GroupSizes:
    extents = [_extents(module) for module in members]
    rank = sum(ranks.get(module, 0) for module in members)
    return GroupSizes(sum(n for n, _ in extents), extents[0][1], padded_rank(rank, dtype))


def _extents(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of a linear's or an embedding's weight."""
    if isinstance(module, nn.Linear):  # also one whose values are packed
        return module.out_features, module.in_features
    rows, *columns = next(module.parameters()).shape
    return rows, prod(columns)


def _weights(
    model: CausalLm,
    layers: Sequence[DecoderLayer],
    groups: Mapping[str, GroupSizes],
    storing: Storing,
    dtype: torch.dtype,
    *,
    tied: bool,
    merged: Collection[nn.Module],
) -> dict[str, int]:
    """Bytes of the base's weights by part, with the adapters' factors beside them.

    merged: the linears that are kept dense and packed.
    """
    packed = {} if storing.format is None else linears_to_quantize(model, storing.skip)
    inner = {id(p) for layer in layers for p in layer.parameters()}
    bytes_of = {"linears": 0, "factors": 0, "embedding": 0, "head": 0, "others": 0}
    placed: set[int] = set()
    for layer in layers:
        for module in layer.modules():
            if not isinstance(module, nn.Linear):
                continue
            shape = (module.out_features, module.in_features)
            values = prod(shape) * module.weight.dtype.itemsize
            if module in packed and storing.format is not None:
                layout = storing.format.layout(shape)
                size = sum(prod(entry.shape) * entry.dtype.itemsize for entry in layout.values())
                values = size + (values if module in merged else 0)
            bytes_of["linears"] += values
            placed.add(id(module.weight))
    augmented = storing.format is None
    for group in groups.values():
        corner = group.rank * group.rank if augmented else 0
        bytes_of["factors"] += (
            len(layers) * dtype.itemsize * (group.rank * (group.inputs + group.outputs) + corner)
        )
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    for _name, parameter in model.named_parameters():
        if id(parameter) in placed:
            continue
        part = "others"
        if id(parameter) not in inner:
            if any(parameter is p for p in embedding.parameters()):
                part = "embedding"
            elif head is not None and any(parameter is p for p in head.parameters()) and not tied:
                part = "head"
        bytes_of[part] += parameter.numel() * parameter.dtype.itemsize
    return {part: size for part, size in bytes_of.items() if size}


def accumulate_bytes(dtype: torch.dtype) -> int:
    """Bytes of a value that sums are made in."""
    return accumulate_dtype(dtype).itemsize
