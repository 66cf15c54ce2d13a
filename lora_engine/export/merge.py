"""Adapters merged into their base, as a model folder that transformers loads."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.export.adapter import Adapter
from lora_engine.export.shards import SINGLE, Planned, write_index, write_shard
from lora_engine.export.weights import MergedWeights, config_sections

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


def merge_folder(
    base: Path,
    adapters: Sequence[tuple[Adapter, float]],
    target: Path,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Write the model in `base` with `adapters` merged into it to the empty folder `target`.

    adapters: with the weight of each. dtype: of the floating-point weights, as in the base if None.
    The tokenizer is the adapters', or the base's where they have none. Raises UserError as
    `MergedWeights`.
    """
    weights = MergedWeights(base, adapters)
    merged = _write(weights, target, dtype)
    if dtype is not None:
        for section in config_sections(weights.config):
            section.pop("torch_dtype", None)
            section["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(weights.config, indent=2) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
    copy_beside(base, adapters[0][0].folder if adapters else base, target)
    return merged


def _write(weights: MergedWeights, target: Path, dtype: torch.dtype | None) -> Merged:
    names_by_file: dict[str, list[str]] = {}
    dtypes: set[str] = set()
    total = 0
    for file in weights.files:
        planned = []
        for name in weights.names(file):
            kept = weights.dtype(name)
            out = dtype if dtype is not None and kept.is_floating_point else kept
            pieces: Callable[[], Iterable[Tensor]] = partial(weights.pieces, name, out)
            planned.append(Planned(name=name, dtype=out, shape=weights.shape(name), pieces=pieces))
            if out.is_floating_point:
                dtypes.add(str(out).removeprefix("torch."))
        written = file.name if len(weights.files) > 1 else SINGLE
        write_shard(target / written, planned)
        names_by_file[written] = [p.name for p in planned]
        total += sum(p.nbytes for p in planned)
    if len(weights.files) > 1:
        write_index(target, names_by_file, total)
    return Merged(
        dtypes=tuple(sorted(dtypes)),
        untied=weights.untied,
        changed=weights.changed,
        total_bytes=total,
    )


def copy_beside(base: Path, adapter: Path, target: Path) -> None:
    """The base's generation settings, and the adapter's tokenizer, or the base's if it has none."""
    own = (adapter / "tokenizer_config.json").is_file()
    settings = base / "generation_config.json"
    files = [settings, *((adapter if own else base) / name for name in _TOKENIZER_FILES)]
    for path in files:
        if path.is_file():
            shutil.copyfile(path, target / path.name)
