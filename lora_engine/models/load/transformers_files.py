"""Model folders as transformers reads them: what is wrong with one, in one line."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_engine.errors import UserError

# Beyond these it is no model's config.json, and transformers would build modules until memory ends.
_MOST_BYTES = 10_000_000
_MOST_LAYERS = 1_000
_LARGEST_NUMBER = 2**31
_LAYER_COUNTS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers"})
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_PICKLES = ("*.bin", "*.pt", "*.pth")


def check_config(path: Path) -> None:
    """Raises UserError if the config.json at `path` cannot be that of a model."""
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path}: is larger than {_MOST_BYTES:,} bytes; get the model's own file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; get the model's own file") from error
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deeply; get the model's own file") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: is not valid JSON: {error.msg}; get the model's own file"
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{path}: holds a number too large; get the model's own file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object; get the model's own file")
    for key, value in _numbers(content):
        most = _MOST_LAYERS if key in _LAYER_COUNTS else _LARGEST_NUMBER
        if value > most:
            raise UserError(
                f"{path}: {key} is {value:,}, no model has more than {most:,}; get the model's own "
                "file"
            )


def _numbers(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield key, value


def check_weights(source: str, model: Any, info: Mapping[str, Any]) -> None:
    """Raises UserError if the weights read are not those the model needs.

    info: what from_pretrained gives with output_loading_info. transformers fills what is missing,
    or of another shape, with random numbers, and leaves out what it does not expect.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        name, *shapes = mismatched[0]
        in_file, in_config = (_shape(shape) for shape in shapes)
        raise UserError(
            f"{source}: {_count(mismatched)} another shape than config.json says, such as {name}: "
            f"{in_file}, not {in_config}; get the config.json and weights of one model"
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{source}: its weights lack {len(missing)} of the model's tensors, such as "
            f"{missing[0]}; get the complete model"
        )
    if beyond := sorted(key for key in info["unexpected_keys"] if _changes_the_model(key, model)):
        raise UserError(
            f"{source}: {_count(beyond)} no place in the model of config.json, such as "
            f"{beyond[0]}; get the config.json and weights of one model"
        )


def _changes_the_model(key: str, model: Any) -> bool:
    """Whether leaving the tensor out gives another model: a layer more than config.json says, or
    the bias of a layer that is to have none. Other extras, heads for other uses say, do not."""
    names = {name for name, _ in model.named_parameters()}
    name = key if key in names else f"{model.base_model_prefix}.{key}"
    patterns = {_any_layer(known) for known in names}
    if _any_layer(key) in patterns or _any_layer(name) in patterns:
        return True
    stem, _, leaf = key.rpartition(".")
    return leaf == "bias" and f"{stem}.weight" in names


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def _shape(shape: Any) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _count(tensors: list[Any]) -> str:
    return "one tensor has" if len(tensors) == 1 else f"{len(tensors):,} tensors have"


@contextmanager
def readable_folder(source: str, resolved: str, what: str = "model") -> Iterator[None]:
    """What transformers raises for a bad folder or hub id, as a UserError.

    what: the part that is read, "model" or "tokenizer".
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a broken file can make transformers fail anywhere
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        problem = _what_is_absent(Path(resolved), what)
        if problem is None:
            lines = str(error).strip().splitlines() or [""]
            reason = lines[0] if isinstance(error, OSError | ValueError) else repr(error)
            problem = f"{_what_failed(Path(resolved), what)}: {reason[:300]}"
        raise UserError(f"{source}: {problem}") from error


def _what_is_absent(folder: Path, what: str) -> str | None:
    if not folder.is_dir():
        return None
    if what == "tokenizer":
        if any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
            return None
        return "has no tokenizer; copy tokenizer.json and tokenizer_config.json into it"
    if any(folder.glob("*.safetensors*")):
        return None
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        return "its weights are pickled, which could run code; convert them to safetensors"
    return "has no weights; copy its model.safetensors into it"


def _what_failed(folder: Path, what: str) -> str:
    if not folder.is_dir():
        return "no such folder, and not to be had from the Hugging Face hub; check the name"
    if what == "tokenizer":
        return "its tokenizer cannot be read, get the model's own files"
    return "cannot be loaded as a causal language model, get the model's own files"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' progress bars and its reports, whose cause becomes an error here."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
