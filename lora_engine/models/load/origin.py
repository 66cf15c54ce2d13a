"""Where a model's weights came from, in names that other people can look up."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from lora_engine.models.attach.head import transformers_model
from lora_engine.models.load.gguf_head import hub_id_of_gguf

# In a converted model's folder: what it was converted from.
CONVERTED_FROM = "converted_from.json"
# In an adapter's folder: the model that it was trained on, as `Base` has it.
BASE_FILE = "base.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Base:
    """A model as others know it.

    name: its hub id, else the name of its file or folder; "" if it has none.
    hub_id, revision: of the Hugging Face hub, where known.
    files: SHA-256 of the files its weights were read from, by name, "" for one that cannot be read
        any more; none for what came from the hub, whose revision says as much.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    files: dict[str, str] = field(default_factory=dict)


def base_of(model: nn.Module) -> Base:
    """The model that `model`, or the PeftModel around it, was loaded from.

    Reads the files of a local model to hash them.
    """
    inner = transformers_model(model)
    source = str(getattr(inner, "name_or_path", "") or "")
    revision = getattr(inner.config, "_commit_hash", None)
    path = Path(source)
    if source and path.is_dir():
        return base_of_folder(path)
    if source and path.is_file():
        hub_id = hub_id_of_gguf(path)
        return Base(hub_id or path.name, hub_id, files={path.name: sha256_of(path)})
    if _HUB_ID.fullmatch(source):
        return Base(source, source, revision)
    return Base(path.name)


def base_of_folder(folder: Path) -> Base:
    """The model in a local folder; reads its files to hash them."""
    return _converted(folder) or _in_hub_cache(folder) or _local_folder(folder)


def write_base(folder: Path, base: Base) -> None:
    """Note in an adapter's `folder` which model it was trained on."""
    text = json.dumps(asdict(base), indent=2, sort_keys=True) + "\n"
    (folder / BASE_FILE).write_text(text, encoding="utf-8")


def read_base(folder: Path) -> Base | None:
    """What `write_base` noted; None for an adapter that others saved."""
    try:
        known = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
        return Base(
            name=known["name"],
            hub_id=known["hub_id"],
            revision=known["revision"],
            files=dict(known["files"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def how_they_differ(trained_on: Base, other: Base) -> str | None:
    """What shows that these are two models; None if nothing does, as of another file format."""
    known = set(trained_on.files.values()) - {""}
    others = set(other.files.values()) - {""}
    if known and others and known != others:
        return f"trained on {trained_on.name or 'a model'}, whose weight files had other contents"
    same_model = trained_on.hub_id is not None and trained_on.hub_id == other.hub_id
    revisions = trained_on.revision, other.revision
    if same_model and all(revisions) and revisions[0] != revisions[1]:
        return f"trained on revision {trained_on.revision} of {trained_on.hub_id}"
    return None


def sha256_of(path: Path) -> str:
    """Of a file's content, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_converted_from(folder: Path, source: Path, hub_id: str | None) -> None:
    """Note in the `folder` of a converted model which file it is, and which model on the hub."""
    content = {"file": source.name, "sha256": sha256_of(source), "hub_id": hub_id}
    (folder / CONVERTED_FROM).write_text(json.dumps(content), encoding="utf-8")


def _converted(folder: Path) -> Base | None:
    note = folder / CONVERTED_FROM
    if not note.is_file():
        return None
    known = json.loads(note.read_text(encoding="utf-8"))
    name, hub_id = known["file"], known["hub_id"]
    return Base(hub_id or name, hub_id, files={name: known["sha256"]})


def _in_hub_cache(folder: Path) -> Base | None:
    """A snapshot in the hub's cache: …/models--ORGANISATION--NAME/snapshots/REVISION."""
    repository, snapshots = folder.parent.parent.name, folder.parent.name
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    hub_id = repository.removeprefix("models--").replace("--", "/")
    return Base(hub_id, hub_id, folder.name)


def _local_folder(folder: Path) -> Base:
    weights = sorted(folder.glob("*.safetensors"))
    files = {}
    for path in weights:
        try:
            files[path.name] = sha256_of(path)
        except OSError:
            files[path.name] = ""
    return Base(folder.resolve().name, files=files)
