"""Tokenised sources on disk, found again by what decides them: contents, recipe, tokenizer, code.

An entry is a folder that is written under another name and renamed when it is whole, so that a
process that is killed leaves none, and of two that write the same one the first is kept. The
folder's time is when it was last read. Who has an entry's arrays mapped keeps them when it goes.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from lora_engine.data.recipe import Recipe
from lora_engine.data.store import OutcomeStore
from lora_engine.data.template import Tokenizer
from lora_engine.data.tokenising import Tokenised

_UNFINISHED = ".unfinished-"
_OLD = 3600  # seconds without a new file, after which what is unfinished was left behind
LIMIT = 20 * 10**9  # bytes of all entries
_PROBLEMS = "problems.json"


def default_folder() -> Path:
    """Where a user's caches belong."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "lora_engine" / "data"


def key_of(files: Sequence[Path], recipe: Recipe, tokenizer: Tokenizer) -> str:
    """What the outcomes of `files` depend on, as one name."""
    digest = hashlib.sha256(_code())
    digest.update(json.dumps(asdict(recipe), sort_keys=True, default=repr).encode())
    digest.update(_signature(tokenizer))
    for path in files:
        digest.update(f"{path}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:40]


def load(folder: Path, key: str) -> Tokenised | None:
    """The entry of that key, or None if there is none that can be read."""
    entry = folder / key
    try:
        problems = json.loads((entry / _PROBLEMS).read_text(encoding="ascii"))
        store = OutcomeStore.load(entry)
    except (OSError, ValueError, KeyError, TypeError):
        _remove(entry)
        return None
    with suppress(OSError):  # of a folder that may only be read
        os.utime(entry)
    return Tokenised(store, [(origin, problem) for origin, problem in problems])


def save(folder: Path, key: str, done: Tokenised, *, limit: int = LIMIT) -> bool:
    """Keep `done`; whether that worked. A cache that cannot be written is none.

    limit: bytes of the folder, for which the entries go that were read least recently; an entry
    that is larger by itself is not kept.
    """
    unfinished = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        if done.store.num_bytes > limit:
            return False
        _make_room(folder, limit - done.store.num_bytes)
        unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
        done.store.save(unfinished)
        (unfinished / _PROBLEMS).write_text(json.dumps(done.problems), encoding="ascii")
        for path in unfinished.iterdir():
            _sync(path)
        _make_room(folder, limit)  # its files are more than its arrays
        unfinished.rename(folder / key)  # fails where another process was first
    except OSError:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        return (folder / key).is_dir()
    return True


def _clear(folder: Path) -> None:
    """Removes what killed processes left behind."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):  # another process removes it, too
            if time.time() - path.stat().st_mtime > _OLD:
                shutil.rmtree(path, ignore_errors=True)


def _make_room(folder: Path, limit: int) -> None:
    """Removes entries, those not read for the longest first, until the folder has `limit` bytes."""
    entries: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process removes it, too
            size = sum(file.stat().st_size for file in path.iterdir())
            entries.append((path.stat().st_mtime, size, path))
    size = sum(size for _, size, _ in entries)
    for _, of_entry, path in sorted(entries):
        if size > limit and not path.name.startswith(_UNFINISHED):
            _remove(path)
            size -= of_entry


def _remove(entry: Path) -> None:
    """Removes an entry, as a whole for whoever looks for it."""
    gone = entry.with_name(f"{_UNFINISHED}{entry.name}-{os.getpid()}")
    with suppress(OSError):  # there is none; another process removes it, too
        entry.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _code() -> bytes:
    """A digest of the modules that make examples: other code may make others."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _signature(tokenizer: Tokenizer) -> bytes:
    """What a tokenizer's tokens depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items())),
        repr(tokenizer.chat_template),
        repr((tokenizer.bos_token, tokenizer.eos_token, list(tokenizer.all_special_tokens))),
    ]
    return "\0".join(parts).encode("utf-8", "surrogatepass")
