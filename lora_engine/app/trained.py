"""What somebody calls RUN: a run, an adapter or a model, and the base that it belongs to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lora_engine.app.config import RunConfig, load_config
from lora_engine.app.merge_aware import ServedAs, served_as
from lora_engine.errors import UserError
from lora_engine.export.adapter import Adapter, adapter_folders, chosen_adapters, read_adapter
from lora_engine.export.packed import Packing
from lora_engine.export.weights import read_config
from lora_engine.files import user_path
from lora_engine.models.load.gguf import converted_gguf
from lora_engine.models.load.load import DTYPES, load_model, resolve_source
from lora_engine.models.load.origin import base_of_folder, how_they_differ, read_base
from lora_engine.models.load.trained_over import read_trained_over
from lora_engine.models.load.transformers_files import quiet_transformers, readable_folder
from lora_engine.training.run.folder import RunFolder

Tell = Callable[[str], None]
# PEFT's names of what has no language model's head.
_OTHER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class Trained:
    """What somebody calls RUN: a run's folder, an adapter's, or a whole model's.

    adapters: by name; empty for a whole model. folder: of the adapters, or the model. base: the
    model they were trained on, as `load_model` takes it. config: of the run, None without one.
    """

    folder: Path
    adapters: dict[str, Path]
    base: str
    config: RunConfig | None

    @property
    def base_folder(self) -> Path:
        """The base as a model folder. Raises UserError if it cannot be had."""
        try:
            resolved = resolve_source(self.base)
            if isinstance(resolved, Path):
                dtype = DTYPES.get(self.config.model.dtype if self.config else "", torch.float32)
                return converted_gguf(resolved, dtype)
            return Path(resolved) if Path(resolved).is_dir() else _of_the_hub(self.base)
        except UserError as error:
            raise UserError(
                f"the base of {self.folder}: {error}; give where it is now with --base"
            ) from error

    @property
    def packing(self) -> Packing | None:
        """The packed bits that the run put the base's linears into; None where it put them into
        none, or the base's files have packed bits already, or the adapter is merge-aware."""
        stated = self.config.model if self.config else None
        if stated is None or stated.quantize is None or not self.adapters or self.served_as:
            return None
        if read_config(self.base_folder).get("quantization_config"):
            return None
        return Packing(stated.quantize, stated.double_quant, stated.quantize_skip)

    @cached_property
    def served_as(self) -> ServedAs | None:
        """What a merge-aware adapter learned over; None for one that was beside its base."""
        found = [served_as(read_trained_over(folder)) for folder in self.adapters.values()]
        return found[0] if len(found) == 1 else None

    def load_base(
        self, *, dtype: str = "auto", device: str | torch.device = "auto"
    ) -> tuple[Any, Any]:
        """The base as the adapters were trained over it, and its tokenizer, by `load_model`.

        Of a merge-aware adapter the base's own weights: `served_as` is applied once it is loaded.
        """
        if self.served_as is not None and dtype == "auto":
            dtype = self.served_as.dtype_name
        packing = self.packing
        options = {} if packing is None else packing.options()
        if self.config is not None and self.config.model.keep_quantized:
            options["keep_quantized"] = isinstance(resolve_source(self.base), Path)
        return load_model(self.base, dtype=dtype, device=device, **options)

    def choose(self, asked: Sequence[str]) -> tuple["Trained", list[tuple[Adapter, float]]]:
        """This with the adapters chosen by "name" or "name=weight" alone, and these with their
        weights. Raises UserError for a whole model."""
        if not self.adapters:
            raise UserError(
                f"{self.folder}: is a whole model, there is no adapter to merge; use it as it is, "
                "or lora-engine export"
            )
        chosen = chosen_adapters(self.adapters, list(asked))
        read = [(read_adapter(self.adapters[name], name), w) for name, w in chosen.items()]
        return replace(self, adapters={name: self.adapters[name] for name in chosen}), read


def find_trained(name: str, base: str | None = None) -> Trained:
    """What `name` names; base: instead of the model that it says it was trained on.

    Raises UserError if nothing trained is there.
    """
    try:
        path = user_path(name)
    except ValueError as error:
        raise UserError(f"RUN {name!r}: {error}") from error
    if not path.is_dir():
        kind = "is a file" if path.exists() else "no such folder"
        raise UserError(f"{path}: {kind}; give the folder of a run, an adapter or a model")
    run, config, folder = RunFolder(path), None, path
    if run.config.is_file() or run.holds_run():
        if not run.adapter.is_dir():
            raise UserError(
                f"{path}: the run has saved nothing yet; end it first: lora-engine train "
                f"{run.config} --resume"
            )
        folder = run.adapter
        config = load_config(run.config) if run.config.is_file() else None
    if (folder / "config.json").is_file():
        return Trained(folder=folder, adapters={}, base=str(folder), config=config)
    adapters = adapter_folders(folder)
    source = base or (config.model.path if config else None)
    if source is None:
        source = read_adapter_base(next(iter(adapters.values())))
    return Trained(folder=folder, adapters=adapters, base=source, config=config)


def read_adapter_base(folder: Path) -> str:
    """The base that an adapter's own settings name. Raises UserError if they name none."""
    known = read_adapter(folder).settings.get("base_model_name_or_path")
    if not known:
        raise UserError(f"{folder}: names no base model; give it with --base")
    return str(known)


def check_base(base: Path, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Raises UserError if an adapter says that it was trained on another model than `base`, or that
    it is no language model's."""
    found = base_of_folder(base)
    for adapter, _ in adapters:
        if (task := adapter.settings.get("task_type")) in _OTHER_TASKS:
            raise UserError(
                f"{adapter.folder}: its task_type is {task}, a model that writes no text, as a "
                "reward model; give the run or the adapter of a language model"
            )
        trained_on = read_base(adapter.folder)
        difference = trained_on and how_they_differ(trained_on, found)
        if difference:
            raise UserError(
                f"{base}: is not the base of the adapter in {adapter.folder}, {difference}; give "
                "that one with --base"
            )


def load_tokenizer_of(trained: Trained, base: Path) -> Any:
    """The tokenizer that was saved with the adapters, or the base's."""
    from transformers import AutoTokenizer

    folders = [*trained.adapters.values(), trained.folder, base]
    folder = next((f for f in folders if (f / "tokenizer_config.json").is_file()), base)
    with readable_folder(str(folder), str(folder), "tokenizer"), quiet_transformers():
        return AutoTokenizer.from_pretrained(folder)


def _of_the_hub(name: str) -> Path:
    """A model of the Hugging Face hub, in its cache."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with readable_folder(name, name), quiet_transformers():
        return Path(snapshot_download(name, allow_patterns=patterns))
