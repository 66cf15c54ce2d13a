"""Adapters merged into their base: float32 arithmetic, one rounding, a few rows in memory at once.

Adapters follow each other as in PEFT's forward with several active: W becomes W + weight s B A, and
with DoRA m / |W0 + s B A| (W + s B A), where W0 is the base's own (see `adapter`).
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.errors import UserError
from lora_engine.export.adapter import Adapter, LowRank, delta_rows
from lora_engine.export.shards import SINGLE, Planned, Shards, row_ranges, write_index, write_shard

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Merged:
    """What `merge_weights` did. dtypes: of the weights written. untied: whether head and embedding,
    one in the base, are two. changed: the base's tensors that the adapters changed."""

    dtypes: tuple[str, ...]
    untied: bool
    changed: tuple[str, ...]
    total_bytes: int


@dataclass(frozen=True)
class _Change:
    """What one adapter does to one stored tensor. added: to a bias, already scaled."""

    weight: float
    low_rank: LowRank | None = None
    whole: Tensor | None = None
    added: Tensor | None = None


def merge_folder(
    base: Path,
    adapters: Sequence[tuple[Adapter, float]],
    target: Path,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Write the model in `base` with `adapters` merged into it to the empty folder `target`.

    adapters: with the weight of each. dtype: of the floating-point weights, as in the base if None.
    The tokenizer is the adapters', or the base's where they have none. Raises UserError for
    adapters that do not fit the base and for weights of which no sum is defined.
    """
    config = read_config(base)
    shards = Shards(base)
    if config.get("quantization_config"):
        raise UserError(
            f"{base}: the base is quantised; give the model of 16 bits that it was made from with "
            "--base"
        )
    _check_weights(adapters)
    changes, tied_head = _changes(base, shards, config, adapters)
    merged = _write(shards, changes, tied_head, target, dtype)
    _write_config(config, target, dtype, untied=merged.untied)
    copy_beside(base, adapters[0][0].folder if adapters else base, target)
    return merged


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


def _check_weights(adapters: Sequence[tuple[Adapter, float]]) -> None:
    for adapter, weight in adapters:
        alone = len(adapters) == 1 and weight == 1
        if adapter.whole and not alone:
            raise UserError(
                f"{adapter.folder}: holds modules trained in full, such as "
                f"{next(iter(adapter.whole))}, of which no sum is defined; merge it alone"
            )
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
        for name, tensor in adapter.whole.items():
            stored = place(name, adapter)
            shape = shards.shape(tied[1] if tied and stored == head else stored)
            if tuple(tensor.shape) != shape:
                raise UserError(_unfit(base, adapter, name, tuple(tensor.shape), shape))
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
                stored = place(f"{module}.bias", adapter)
                added = layer.bias.float() * layer.scaling
                changes.setdefault(stored, []).append(_Change(weight, added=added))
    return changes, tied


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


def _write(
    shards: Shards,
    changes: dict[str, list[_Change]],
    tied: tuple[str, str] | None,
    target: Path,
    dtype: torch.dtype | None,
) -> Merged:
    untied = tied is not None and _parted(shards, changes, *tied)
    names_by_file: dict[str, list[str]] = {}
    dtypes: set[str] = set()
    total = 0
    for file in shards.files:
        planned = []
        for name in shards.names(file):
            kept = shards.dtype(name)
            out = dtype if dtype is not None and kept.is_floating_point else kept
            outputs = [(name, name)]
            if untied and tied is not None and name == tied[1]:
                outputs.append((tied[0], name))
            for output, source in outputs:
                of_tensor = changes.get(output, [])
                pieces = _pieces(shards, source, of_tensor, out)
                planned.append(Planned(output, out, shards.shape(source), pieces))
            if out.is_floating_point:
                dtypes.add(str(out).removeprefix("torch."))
        written = file.name if len(shards.files) > 1 else SINGLE
        write_shard(target / written, planned)
        names_by_file[written] = [p.name for p in planned]
        total += sum(p.nbytes for p in planned)
    if len(shards.files) > 1:
        write_index(target, names_by_file, total)
    return Merged(tuple(sorted(dtypes)), untied, tuple(sorted(changes)), total)


def _parted(shards: Shards, changes: dict[str, list[_Change]], head: str, embedding: str) -> bool:
    """Whether the head, tied in the base, and its embedding differ once they are merged."""
    if head not in changes and embedding not in changes:
        return False
    sides = [
        _pieces(shards, embedding, changes.get(n, []), torch.float32) for n in (head, embedding)
    ]
    return any(not torch.equal(a, b) for a, b in zip(sides[0](), sides[1](), strict=True))


def _pieces(
    shards: Shards, name: str, changes: list[_Change], dtype: torch.dtype
) -> Callable[[], Iterable[Tensor]]:
    """What gives the merged tensor in runs of rows, in `dtype`."""

    def pieces() -> Iterator[Tensor]:
        shape = shards.shape(name)
        if not shape:
            yield shards.tensor(name).to(dtype)
            return
        scales = [_dora_scale(shards, name, change) for change in changes]
        for start, stop in row_ranges(shape):
            stored = shards.rows(name, start, stop)
            yield _merged_rows(stored, changes, scales, start, stop).to(dtype)

    return pieces


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


def _write_config(
    config: dict[str, Any], target: Path, dtype: torch.dtype | None, *, untied: bool
) -> None:
    sections = [config] + [c for c in (config.get("text_config"),) if isinstance(c, dict)]
    for section in sections:
        if dtype is not None:
            section.pop("torch_dtype", None)
            section["dtype"] = str(dtype).removeprefix("torch.")
        if untied:
            section["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_beside(base: Path, adapter: Path, target: Path) -> None:
    """The base's generation settings, and the adapter's tokenizer, or the base's if it has none."""
    own = (adapter / "tokenizer_config.json").is_file()
    settings = base / "generation_config.json"
    files = [settings, *((adapter if own else base) / name for name in _TOKENIZER_FILES)]
    for path in files:
        if path.is_file():
            shutil.copyfile(path, target / path.name)
