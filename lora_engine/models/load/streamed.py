"""Models filled from their files one tensor at a time, with linears in packed bits.

Beside the model, no more than the tensor that is read and what it is made into are in memory.
Linears that the files keep packed stay as they are; of others, those chosen are quantised.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_engine.errors import UserError
from lora_engine.models.load.checkpoint_layers import Parts, Reader, is_packed, reader_of
from lora_engine.models.load.shards import Shards
from lora_engine.models.load.skeleton import Place, empty_model, places, put, tensors
from lora_engine.models.load.transformers_files import check_weights, quiet_transformers
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.models.quantized.quantize import SKIPPED, linears_to_quantize
from lora_engine.models.quantized.record import record_quantization
from lora_engine.models.sharded.shard import store_linear
from lora_engine.ops import HostMemory, QuantizedWeight
from lora_engine.quantization.format import all_finite
from lora_engine.scratch_file import ScratchFile

Progress = Callable[[int, int], None]


class Quantize(NamedTuple):
    """linears: chooses those of a model without weights. weight: packs a weight by its name."""

    linears: Callable[[nn.Module], Iterable[nn.Linear]]
    weight: Callable[[str, Tensor], QuantizedWeight]


def streamed_model(
    source: str,
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize | None = None,
    progress: Progress | None = None,
    scratch: ScratchFile | HostMemory | None = None,
) -> Any | None:
    """The model in `folder`, on `device`.

    scratch: where the weights of linears go, but for heads, each when it was read.
    progress: called with the bytes read so far and those of all files. None where no linear is
    packed in the files and their tensors are not the model's one by one, so that transformers has
    to convert them. Raises UserError, with file and tensor, for whatever is wrong; nothing is
    returned then.
    """
    stated = stated_quantization(config)
    try:
        reader = reader_of(stated)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    files = _Files(Shards(folder), "")
    model = empty_model(config, dtype)
    files.prefix = f"{model.base_model_prefix}."
    packed, dense, missing = _work(model, files)
    if packed and quantize is not None:
        raise UserError(f"{source}: its weights are quantised already; leave quantize out")
    if missing and not packed:
        return None
    _check(source, model, files, packed, dense, missing)
    if stated and not packed:
        raise UserError(f"{source}: config.json says it is quantised, but no linear of it is")
    linears = set(quantize.linears(model)) if quantize is not None else set()
    stored = set() if scratch is None else set(linears_to_quantize(model, SKIPPED))
    done, total = 0, sum(stored.nbytes for stored in files.shards.tensors.values())
    every: list[_Packed | _Dense] = [*packed, *dense]
    for work in sorted(every, key=files.turn):
        if isinstance(work, _Packed):
            filled = _fill_packed(model, work, files, dtype, device, reader, stated)
            original: nn.Module = work.linear
        else:
            owner = work.place.parent
            chosen = quantize if work.place.child == "weight" and owner in linears else None
            filled = _fill_dense(model, work, files, device, chosen)
            original = owner
        if scratch is not None and filled is not None and original in stored:
            replace(model, filled, store_linear(filled, scratch))
            filled.register_parameter("weight", None)  # the list of work still has the linear
        done += sum(files.shards.tensors[key].nbytes for key in work.keys.values())
        if progress is not None:
            progress(done, total)
    model.tie_weights()
    record_quantization(model)
    _read_generation_config(model, folder)
    return model.to(device)


def stated_quantization(config: Any) -> Mapping[str, Any]:
    """The `quantization_config` of a model's configuration; {} where there is none."""
    stated = getattr(config, "quantization_config", None) or {}
    found: Mapping[str, Any] = stated if isinstance(stated, dict) else stated.to_dict()
    return found


@dataclass
class _Packed:
    """A linear in packed bits: its keys by what follows its name in them."""

    linear: nn.Linear
    name: str
    keys: dict[str, str]


@dataclass
class _Dense:
    """A tensor of the model, and its key."""

    place: Place
    tensor: Tensor
    keys: dict[str, str]


class _Files:
    """The files' tensors by the model's names, whose base model may have another prefix there."""

    def __init__(self, shards: Shards, prefix: str) -> None:
        self.shards, self.prefix = shards, prefix
        self.below: dict[str, dict[str, str]] = {}  # of a module: what follows its name, and keys
        for key in shards.tensors:
            parts = key.split(".")
            for count in range(1, len(parts)):
                rest = ".".join(parts[count:])
                self.below.setdefault(".".join(parts[:count]), {})[rest] = key

    def key(self, name: str) -> str | None:
        """The key of a tensor."""
        return next((key for key in self._names(name) if key in self.shards.tensors), None)

    def of_module(self, name: str) -> dict[str, str]:
        """The keys of a module's tensors by what follows its name in them."""
        return next((self.below[key] for key in self._names(name) if key in self.below), {})

    def _names(self, name: str) -> Iterator[str]:
        yield name
        yield name.removeprefix(self.prefix) if name.startswith(self.prefix) else self.prefix + name

    def turn(self, work: _Packed | _Dense) -> tuple[bool, str, int]:
        """Biases first, which packed linears take along; then as the tensors stand in the files."""
        first = min(
            (self.shards.tensors[key] for key in work.keys.values()),
            key=lambda stored: (str(stored.file), stored.start),
        )
        is_bias = isinstance(work, _Dense) and work.place.child == "bias"
        return not is_bias, str(first.file), first.start


def _work(model: Any, files: _Files) -> tuple[list[_Packed], list[_Dense], list[str]]:
    """Linears that the files keep packed, other tensors, and names that the files lack."""
    packed, dense, missing = [], [], []
    done: set[int] = set()
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        keys = files.of_module(name)
        weight = files.shards.tensors[keys["weight"]] if "weight" in keys else None
        if is_packed(frozenset(keys), None if weight is None else weight.dtype):
            packed.append(_Packed(module, name, keys))
            done |= {id(p) for p in module.parameters(recurse=False)}
            if module.bias is not None and "bias" not in keys:
                missing.append(f"{name}.bias")
    for place, tensor in tensors(model):
        if id(tensor) in done:
            continue
        key = files.key(place.name)
        if key is None:
            missing.append(place.name)
        else:
            dense.append(_Dense(place, tensor, {"": key}))
    return packed, dense, missing


def _check(
    source: str,
    model: Any,
    files: _Files,
    packed: list[_Packed],
    dense: list[_Dense],
    missing: list[str],
) -> None:
    """Raises UserError where the files' tensors are not those of the model."""
    mismatched = []
    for work in dense:
        stored = files.shards.tensors[work.keys[""]].shape
        if stored != tuple(work.tensor.shape):
            mismatched.append((work.place.name, stored, tuple(work.tensor.shape)))
    every = dict(model.named_parameters(remove_duplicate=False))
    used = {key for of in packed for key in of.keys.values()}
    used |= {of.keys[""] for of in dense}
    used |= {key for name in every if (key := files.key(name)) is not None}  # tied ones as well
    info = {
        "missing_keys": missing,
        "mismatched_keys": mismatched,
        "unexpected_keys": set(files.shards.tensors) - used,
    }
    check_weights(source, model, info)


def _fill_packed(
    model: Any,
    work: _Packed,
    files: _Files,
    dtype: torch.dtype,
    device: torch.device,
    reader: Reader,
    stated: Mapping[str, Any],
) -> nn.Linear | None:
    """Returns the linear that has the weight; None of a head."""
    linear, keys = work.linear, work.keys
    shape = (linear.out_features, linear.in_features)

    def read(part: str) -> Tensor:
        return files.shards.read(keys[part])

    try:
        weight = reader(
            Parts(name=work.name, shape=shape, dtype=dtype, names=frozenset(keys), read=read),
            stated,
        )
    except ValueError as error:
        file = files.shards.tensors[next(iter(keys.values()))].file
        raise UserError(f"{file}: {work.name}.weight: {error}") from error
    bias = read("bias").to(device, dtype) if linear.bias is not None else None
    if linear is model.get_output_embeddings():  # the loss multiplies by it as it is
        linear.weight = nn.Parameter(weight.dequantize().to(device))
        linear.bias = None if bias is None else nn.Parameter(bias)
        return None
    filled = QuantizedLinear(weight.to(device), bias)
    replace(model, linear, filled)
    return filled


def _fill_dense(
    model: Any, work: _Dense, files: _Files, device: torch.device, quantize: Quantize | None
) -> nn.Linear | None:
    """Returns the linear whose weight it is; None of other tensors."""
    place, key = work.place, work.keys[""]
    value = files.shards.read(key)
    if value.is_floating_point() and not all_finite(value):
        raise UserError(
            f"{files.shards.tensors[key].file}: {key} has values that are not finite; get the "
            "model's own files"
        )
    value = value.to(device)
    if quantize is None:
        put(place, work.tensor, value)
        if isinstance(place.parent, nn.Linear) and place.child == "weight":
            return place.parent
        return None
    linear = place.parent
    assert isinstance(linear, nn.Linear)
    weight = quantize.weight(place.name, value.to(work.tensor.dtype))
    filled = QuantizedLinear(weight, linear.bias)
    replace(model, linear, filled)
    return filled


def replace(model: nn.Module, linear: nn.Linear, other: nn.Linear) -> None:
    """Puts `other` everywhere in the model where `linear` is."""
    for place in places(model, linear):
        setattr(place.parent, place.child, other.train(linear.training))


def _read_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        with quiet_transformers():
            model.generation_config = GenerationConfig.from_pretrained(folder)
