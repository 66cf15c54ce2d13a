"""A PEFT LoRA adapter as tensors: what each of the base model's weights gains from it.

For a weight W [N, K] of a linear, A [r, K] and B [N, r], PEFT's layer computes as if W were

    W + s B A                      s = alpha / r, of rsLoRA alpha / sqrt(r)
    m / |W + s B A| (W + s B A)    DoRA; |.| the norm of each of the N rows, m [N] learned

(Hu et al. 2021, Kalajdzievski 2023, Liu et al. 2024). An embedding stores W transposed, [K, N] with
K the vocabulary, and so does GPT-2's Conv1D. Weights trained in full replace the base's.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.errors import UserError, nearest
from lora_engine.ops.mergeable_weight import low_rank_rows

_PREFIX = "base_model.model."
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?P<leaf>\.weight|\.bias)?"
)
_OTHER_KINDS = re.compile(r"\.(lora_|token_adapter|ia3_|ranknum|vera_|oft_)")
# Initialisations after which the base is no longer the published one.
_ALTERS_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva_residual")
_OWN_FILE = "get the adapter's own file"
# Settings of variants that compute something else than this adds to a weight.
_NOT_MERGED = (
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
    *("layer_replication", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)


@dataclass
class LowRank:
    """What an adapter adds to one weight.

    a: [r, K]. b: [N, r]. scaling: of their product. magnitude: [N] of DoRA, else None. transposed:
    whether the base stores [K, N]. bias: [N], added to the module's bias by the same scaling.
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None
    transposed: bool
    bias: Tensor | None


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read from `folder`.

    low_rank: by the module's name in the base model. whole: tensors that replace the base's, by
    their name in it. settings: adapter_config.json.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    low_rank: dict[str, LowRank]
    whole: dict[str, Tensor]

    @property
    def is_dora(self) -> bool:
        return any(layer.magnitude is not None for layer in self.low_rank.values())


def adapter_folders(folder: Path) -> dict[str, Path]:
    """The adapters in a run's `adapter` folder, or in a folder that PEFT wrote, by name.

    Raises UserError if there is none.
    """
    found = {"default": folder} if (folder / "adapter_config.json").is_file() else {}
    if folder.is_dir():
        # Hidden is what a killed process left half written.
        inner = sorted(path.parent for path in folder.glob("[!.]*/adapter_config.json"))
        found |= {path.name: path for path in inner}
    if not found:
        raise UserError(
            f"{folder}: holds no adapter, a folder with adapter_config.json; give the folder of a "
            "run, or of an adapter that PEFT saved"
        )
    return found


def chosen_adapters(available: dict[str, Path], asked: list[str]) -> dict[str, float]:
    """Weights by name of adapters asked for as "name" or "name=0.5"; all of one, if none are.

    Raises UserError for an unknown name, a weight that is no finite number, and where several are
    there and none is chosen.
    """
    names = ", ".join(available)
    if not asked:
        if len(available) > 1:
            raise UserError(
                f"there are several adapters, {names}: choose with --adapter NAME, or add them up "
                "with --adapter NAME=WEIGHT for each"
            )
        return dict.fromkeys(available, 1.0)
    chosen: dict[str, float] = {}
    for text in asked:
        name, equals, number = text.partition("=")
        if name not in available:
            close = nearest(name, available)
            raise UserError(
                f"--adapter {text}: no adapter {name!r}; "
                + (f"did you mean {close}?" if close else f"there is {names}")
            )
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UserError(f"--adapter {text}: {number!r} is no weight; give a number, {name}=0.5")
        if name in chosen:
            raise UserError(f"--adapter {text}: {name} is given twice; give it once")
        chosen[name] = weight
    return chosen


def read_adapter(folder: Path, name: str = "default") -> Adapter:
    """The adapter in `folder`, its tensors as they are stored.

    Raises UserError for an adapter that is not LoRA, one whose base was altered when it was made,
    and for tensors this cannot be merged with.
    """
    settings = _settings(folder / "adapter_config.json")
    low_rank: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in _tensors(folder).items():
        place = f"{folder}: tensor {key}"
        if not torch.isfinite(tensor).all():
            raise UserError(f"{place} holds values that are not finite; take an earlier checkpoint")
        if not key.startswith(_PREFIX):
            raise UserError(f"{place} does not begin with {_PREFIX}; save the adapter with PEFT")
        key = key.removeprefix(_PREFIX)
        match = _LOW_RANK.fullmatch(key)
        if match is None:
            stem, _, leaf = key.rpartition(".")
            if leaf not in ("weight", "bias") or _OTHER_KINDS.search(stem):
                raise UserError(f"{place} cannot be merged; LoRA, DoRA and whole modules can")
            whole[f"{stem.removesuffix('.base_layer')}.{leaf}"] = tensor
            continue
        part = match["part"] + ("_bias" if match["leaf"] == ".bias" else "")
        low_rank.setdefault(match["module"], {})[part] = tensor
    layers = {m: _low_rank(parts, m, settings, folder) for m, parts in low_rank.items()}
    for module, layer in layers.items():
        if (layer.magnitude is not None) != bool(settings.get("use_dora")):
            has = "no" if layer.magnitude is None else "a"
            raise UserError(
                f"{folder}: {module} has {has} vector of magnitudes, and use_dora is "
                f"{settings.get('use_dora')!r}; get the adapter's own files"
            )
    return Adapter(name=name, folder=folder, settings=settings, low_rank=layers, whole=whole)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent}: is no adapter, it has no {path.name}; give the folder of one"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); {_OWN_FILE}") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise UserError(f"{path}: peft_type is {kind!r}; only LORA adapters can be merged")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_ALTERS_THE_BASE):
        raise UserError(
            f"{path}: made with init_lora_weights={start}, which alters the base; convert the "
            "adapter with PEFT's path_initial_model_for_weight_conversion first"
        )
    for field in _NOT_MERGED:
        if settings.get(field):
            raise UserError(f"{path}: {field} is set, which cannot be merged; train without it")
    _check_scaling(path, settings)
    return settings


def _check_scaling(path: Path, settings: dict[str, Any]) -> None:
    """Raises UserError for ranks and alphas that are no such numbers."""

    def check(field: str, value: object) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and math.isfinite(value)  # type: ignore[arg-type]
        if field.startswith("r"):
            fits = fits and isinstance(value, int) and value > 0
        if not fits:
            raise UserError(f"{path}: {field} is {value!r}, no such number; {_OWN_FILE}")

    check("r", settings.get("r"))
    check("lora_alpha", settings.get("lora_alpha"))
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(field) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{path}: {field} is {patterns!r}, no patterns; {_OWN_FILE}")
        for pattern, value in patterns.items():
            check(f"{field} of {pattern}", value)
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{path}: {field} {pattern!r}: {error}; {_OWN_FILE}") from error


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        mend = "its weights are pickled, save them as safetensors" if pickled else "copy it there"
        raise UserError(f"{folder}: has no {path.name}; {mend}")
    try:
        return load_file(path)
    except Exception as error:  # a broken file can make the reader fail in many ways
        raise UserError(f"{path}: cannot be read, get the complete file: {error}") from error


def _low_rank(
    parts: dict[str, Tensor], module: str, settings: dict[str, Any], folder: Path
) -> LowRank:
    embedding = "embedding_A" in parts
    a = parts.get("embedding_A" if embedding else "A")
    b = parts.get("embedding_B" if embedding else "B")
    fits = a is not None and b is not None and a.dim() == b.dim() == 2 and len(a) == b.shape[1]
    if a is None or b is None or not fits:
        raise UserError(
            f"{folder}: the adapter of {module} is not a pair of matrices [r, K] and [N, r]; "
            "get the complete adapter"
        )
    rank = len(a)
    alpha = float(_for_module(settings.get("alpha_pattern"), module, settings["lora_alpha"]))
    scaling = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    magnitude = parts.get("magnitude_vector")
    return LowRank(
        a=a,
        b=b,
        scaling=scaling,
        magnitude=None if magnitude is None else magnitude.reshape(-1),
        transposed=embedding or bool(settings.get("fan_in_fan_out")),
        bias=parts.get("B_bias"),
    )


def _for_module(patterns: dict[str, Any] | None, module: str, otherwise: Any) -> Any:
    """PEFT's alpha_pattern: the first pattern that is the module's name, or its end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def delta_rows(layer: LowRank, start: int, stop: int) -> Tensor:
    """Rows start:stop of what is added to the weight as it is stored, in float32: [rows, …]."""
    if layer.transposed:
        a, b = layer.a.float(), layer.b.float()
        return (a[:, start:stop].T @ b.T) * layer.scaling
    return low_rank_rows(layer.a, layer.b, layer.scaling, start, stop)
