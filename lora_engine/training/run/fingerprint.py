"""SHA-256 of files, of weights, and of a tokenizer; the same on every device."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from lora_engine.data.template import Tokenizer

_PIECE = 1 << 24  # bytes read, or copied from a device, at once
_THREADS = min(4, os.cpu_count() or 1)  # hashlib lets other threads run meanwhile

Item = TypeVar("Item")


def files_sha256(paths: Sequence[Path]) -> list[str]:
    """The SHA-256 of each file, in hexadecimal."""
    return _in_parallel(_file_sha256, paths)


def tensors_sha256(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """One SHA-256 of all names, dtypes, shapes and values, whatever the order of the tensors.

    All bytes count, so that a single changed value shows: about a second for each GB and core.
    """
    digests = _in_parallel(_tensor_sha256, sorted(named, key=lambda item: item[0]))
    return json_sha256(digests)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """SHA-256 of the vocabulary and the special tokens."""
    return json_sha256([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map])


def json_sha256(value: object) -> str:
    """SHA-256 of a value as JSON; what JSON does not know counts as its str()."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _in_parallel(digest: Callable[[Item], str], items: Sequence[Item]) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(digest, items))


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _tensor_sha256(item: tuple[str, torch.Tensor]) -> str:
    name, tensor = item
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    rows = tensor.detach()
    rows = rows[None] if rows.dim() == 0 else rows
    if rows.numel():
        row_bytes = rows[0].numel() * rows.element_size()
        for piece in rows.split(max(1, _PIECE // row_bytes)):
            own = piece.cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(own.numpy())
    return digest.hexdigest()
