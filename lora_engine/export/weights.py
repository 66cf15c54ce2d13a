"""A base's weights with adapters in them, computed a few rows at a time as they are asked for.

Adapters follow each other as in PEFT's forward with several active: W becomes W + weight s B A, and
with DoRA m / |W0 + s B A| (W + s B A), where W0 is the base's own (see `adapter`).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.errors import UserError
from lora_engine.export.adapter import Adapter, LowRank, delta_rows
from lora_engine.export.shards import Shards
from lora_engine.ops.tensors import row_ranges


@dataclass(frozen=True)
class _Change:
    """What one adapter does to one stored tensor. added: to a bias, already scaled."""

    weight: float
    low_rank: LowRank | None = None
    whole: Tensor | None = None
    added: Tensor | None = None


class MergedWeights:
    """The weights of the model in `base` with `adapters`, each with its weight, merged into it.

    config: config.json, as it is for the merged model. Raises UserError for adapters that do not
    fit the base, for weights of which no sum is defined, and for a quantised base.
    """

    def __init__(self, base: Path, adapters: Sequence[tuple[Adapter, float]] = ()) -> None:
        self.base = base
        self.config = read_config(base)
        self._shards = Shards(base)
        if self.config.get("quantization_config"):
            raise UserError(
                f"{base}: the base is quantised; give the model of 16 bits that it was made from "
                "with --base"
            )
        _check_weights(adapters)
        self._changes, self._tied = _changes(base, self._shards, self.config, adapters)
        if self.untied:
            for section in config_sections(self.config):
                section["tie_word_embeddings"] = False

    @property
    def changed(self) -> tuple[str, ...]:
        """The tensors that the adapters change."""
        return tuple(sorted(self._changes))

    @property
    def files(self) -> list[Path]:
        return self._shards.files

    @cached_property
    def untied(self) -> bool:
        """Whether head and embedding, one in the base, differ once they are merged."""
        if self._tied is None or not set(self._tied) & set(self._changes):
            return False
        one, other = (self._pieces(self._tied[1], name, torch.float32) for name in self._tied)
        return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def names(self, file: Path | None = None) -> list[str]:
        """Those of one of the base's files, or of all; an untied head follows its embedding."""
        names = []
        for name in self._shards.names(file):
            names.append(name)
            if self._tied is not None and name == self._tied[1] and self.untied:
                names.append(self._tied[0])
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shards.shape(self._source(name))

    def dtype(self, name: str) -> torch.dtype:
        """The base's."""
        return self._shards.dtype(self._source(name))

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tensor in runs of rows, in `dtype`."""
        return self._pieces(self._source(name), name, dtype)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor in float32."""
        pieces = list(self.pieces(name, torch.float32))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _source(self, name: str) -> str:
        """The base's tensor that becomes this one."""
        return self._tied[1] if self._tied is not None and name == self._tied[0] else name

    def _pieces(self, source: str, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        shape, changes = self._shards.shape(source), self._changes.get(name, [])
        if not shape:
            yield _rounded(self._shards.tensor(source), dtype, name)
            return
        scales = [_dora_scale(self._shards, source, change) for change in changes]
        for start, stop in row_ranges(shape):
            stored = self._shards.rows(source, start, stop)
            merged = _merged_rows(stored, changes, scales, start, stop)
            yield _rounded(merged, dtype, name)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: is no model folder, it has no config.json") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); get the model's own file") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: is no model's configuration; get the model's own file")
    return config


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding, by the model's own configuration.

    A config.json leaves out what is its model_type's default.
    """
    from transformers import AutoConfig

    kind = dict(config)
    try:
        full = AutoConfig.for_model(kind.pop("model_type"), **kind)
    except (KeyError, ValueError):
        return bool(config.get("tie_word_embeddings"))
    return bool(getattr(full, "tie_word_embeddings", False))


def config_sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configuration and, of a model with several parts, that of its language model."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def _check_weights(adapters: Sequence[tuple[Adapter, float]]) -> None:
    for adapter, weight in adapters:
        if adapter.is_dora and weight != 1:
            raise UserError(
                f"--adapter {adapter.name}={weight:g}: the adapter is DoRA, which has no weight; "
                "leave it at 1"
            )


def _changes(
    base: Path,
    shards: Shards,
    config: Mapping[str, Any],
    adapters: Sequence[tuple[Adapter, float]],
) -> tuple[dict[str, list[_Change]], tuple[str, str] | None]:
    """What changes by the base's tensors, and the head's and the embedding's names if tied."""
    changes: dict[str, list[_Change]] = {}
    tied: tuple[str, str] | None = None
    head = "lm_head.weight"
    embedding = _embedding(shards) if head not in shards and is_tied(config) else None
    if embedding is not None:
        tied = (head, embedding)

    def place(name: str, adapter: Adapter) -> str:
        stored = head if tied and name == head else _stored_name(name, shards)
        if stored is None:
            raise UserError(
                f"{base}: has no tensor {name}, which the adapter in {adapter.folder} changes; "
                "give the base that it was trained on with --base"
            )
        return stored

    for adapter, weight in adapters:
        alone = len(adapters) == 1 and weight == 1
        for name, tensor in adapter.whole.items():
            stored = place(name, adapter)
            source = tied[1] if tied and stored == head else stored
            shape = shards.shape(source)
            if tuple(tensor.shape) != shape:
                raise UserError(_unfit(base, adapter, name, tuple(tensor.shape), shape))
            if _holds(shards, source, tensor):  # of a head with LoRA, PEFT saves the base's too
                continue
            if not alone:
                raise UserError(
                    f"{adapter.folder}: holds modules trained in full, such as {name}, of which "
                    "no sum is defined; merge it alone"
                )
            changes.setdefault(stored, []).append(_Change(weight, whole=tensor))
        for module, layer in adapter.low_rank.items():
            name = f"{module}.weight"
            stored = place(name, adapter)
            shape = shards.shape(tied[1] if tied and stored == head else stored)
            sizes = (len(layer.b), layer.a.shape[1])
            expected = sizes[::-1] if layer.transposed else sizes
            if expected != shape:
                raise UserError(_unfit(base, adapter, name, expected, shape))
            changes.setdefault(stored, []).append(_Change(weight, low_rank=layer))
            if layer.bias is not None:
                if _stored_name(f"{module}.bias", shards) is None:
                    raise UserError(
                        f"{adapter.folder}: adds a bias to {module} (lora_bias), which has none in "
                        f"{base}, nor a place for one; use the adapter beside its base"
                    )
                stored = place(f"{module}.bias", adapter)
                added = layer.bias.float() * layer.scaling
                changes.setdefault(stored, []).append(_Change(weight, added=added))
    return changes, tied


def _holds(shards: Shards, name: str, tensor: Tensor) -> bool:
    """Whether the base's tensor `name`, of the same shape, is this one."""
    if not tensor.dim():
        return torch.equal(shards.tensor(name).to(tensor.dtype), tensor)
    ranges = row_ranges(tuple(tensor.shape))
    return all(
        torch.equal(shards.rows(name, a, b).to(tensor.dtype), tensor[a:b]) for a, b in ranges
    )


def _embedding(shards: Shards) -> str | None:
    names = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
    return next((n for n in shards.names() if n.endswith(names)), None)


def _stored_name(name: str, shards: Shards) -> str | None:
    """The base's name for a tensor: files may leave the first part out, or have one more."""
    if name in shards:
        return name
    inner = name.partition(".")[2]
    if inner in shards:
        return inner
    longer = [known for known in shards.names() if known.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None


def _unfit(
    base: Path,
    adapter: Adapter,
    name: str,
    of_adapter: Sequence[int],
    of_base: Sequence[int],
) -> str:
    return (
        f"{base}: {name} is {list(of_base)}, the adapter in {adapter.folder} is for "
        f"{list(of_adapter)}; give the base that it was trained on with --base"
    )


def _merged_rows(
    stored: Tensor,
    changes: list[_Change],
    scales: list[Tensor | None],
    start: int,
    stop: int,
) -> Tensor:
    if not changes:
        return stored
    result = stored.float()
    for change, scale in zip(changes, scales, strict=True):
        if change.whole is not None:  # is merged alone, with weight 1
            result = change.whole[start:stop].float()
        elif change.added is not None:
            result = result + change.weight * change.added[start:stop]
        elif change.low_rank is not None:
            delta = delta_rows(change.low_rank, start, stop)
            result = result + (delta if change.weight == 1 else change.weight * delta)
            if scale is not None:
                result = result * (scale if change.low_rank.transposed else scale[start:stop, None])
    return result


def _rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`values` in `dtype`. Raises UserError where it cannot hold one, or one is not finite."""
    rounded = values.to(dtype)
    if dtype.itemsize > 1 and not _is_finite(rounded):
        if _is_finite(values):
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"tensor {name} holds values beyond {kind}'s; use --dtype bfloat16")
        raise UserError(f"tensor {name} holds values that are not finite; the weights are damaged")
    return rounded


def _is_finite(values: Tensor) -> bool:
    """Of all of them; without a tensor of their size, as torch.isfinite makes."""
    return values.numel() == 0 or all(map(math.isfinite, map(float, values.aminmax())))


def _dora_scale(shards: Shards, name: str, change: _Change) -> Tensor | None:
    """[N]: DoRA's magnitude over the norms of the rows of W + s B A; None without DoRA."""
    layer = change.low_rank
    if layer is None or layer.magnitude is None:
        return None
    shape = shards.shape(name)
    squares = torch.zeros(len(layer.magnitude), dtype=torch.float64)
    for start, stop in row_ranges(shape):
        adapted = shards.rows(name, start, stop).float() + delta_rows(layer, start, stop)
        if layer.transposed:
            squares += adapted.double().square().sum(0)
        else:
            squares[start:stop] = adapted.double().square().sum(1)
    return (layer.magnitude.double() / squares.sqrt()).float()
