"""What decides a run's weights, as JSON values, which a checkpoint and its continuation share.

What changes only how numbers are rounded (the device, the kernels) is no part of it: the run goes
on, and a line in the log says so.
"""

import json
import logging
from collections.abc import Mapping
from inspect import isfunction
from typing import cast

import numpy as np
import torch
from torch import nn

from lora_engine.data.template import Tokenizer
from lora_engine.errors import UserError
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.peft.routing import active_adapters
from lora_engine.models.sharded.linear import ShardedLinear
from lora_engine.objectives.base import Objective, settings_of
from lora_engine.objectives.sft import SFT
from lora_engine.ops import StoredWeight
from lora_engine.training.run.fingerprint import json_sha256, tensors_sha256, tokenizer_sha256

logger = logging.getLogger(__name__)

Identity = dict[str, dict[str, object]]

_HASH = "sha256:"  # begins values that are hashes; messages do not show these
_SHOWN = 3
_LONGEST_VALUE = 80

# How a message calls what has changed.
_HASHED = {
    "weights": "other model weights",
    "vocabulary": "another vocabulary of the tokenizer",
    "chat template": "another chat template",
    "training data": "other training data",
    "held-out data": "other held-out data",
    "probe": "another probe",
}

# Fields of the model's and PEFT's configurations that differ by place or library version, or that
# no gradient depends on.
_NOT_COMPARED = frozenset(
    {
        "architectures",
        "auto_mapping",
        "base_model_name_or_path",
        "dtype",  # the parameters' own dtypes are compared
        "inference_mode",
        "output_attentions",
        "output_hidden_states",
        "peft_version",
        "return_dict",
        "revision",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def run_identity(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    settings: Mapping[str, object],
    objective: Objective,
    data: Mapping[str, str | None],
    origin: Mapping[str, object] | None,
) -> Identity:
    """The identity of a run that trains `model`.

    settings: of the training. data: hashes, by the name of what was hashed. origin: what the model
        was made from, by name. Its "weights" are the fingerprint of the model before adapters and
        training; without them the frozen parameters are hashed.
    """
    if origin is None or "weights" not in origin:
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        origin = {**(origin or {}), "weights": _weights_sha256(model, frozen)}
    config = transformers_model(model).config
    identity: Identity = {
        "settings": dict(settings),
        "objective": settings_of(objective),
        **_adapters(model),
        "model": {
            "dtype": _dtypes(model),
            **origin,
            "weights": f"{_HASH}{origin['weights']}",
            "_name": getattr(config, "_name_or_path", ""),
        },
        "model's config": _compared(config.to_dict()),
        "tokenizer": {
            "vocabulary": _vocabulary(tokenizer),
            "chat template": _hashed(getattr(tokenizer, "chat_template", None)),
        },
        "data": {what: sha256 and _HASH + sha256 for what, sha256 in data.items()},
    }
    text = json.dumps(identity, default=_as_json)
    return cast(Identity, json.loads(text, parse_constant=str))


def model_weights_sha256(model: nn.Module) -> str:
    """The fingerprint of all of a model's weights, before adapters and training."""
    return _weights_sha256(model, {name for name, _ in model.named_parameters()})


def check_identity(
    where: object, saved: Mapping[str, Mapping[str, object]], current: Identity
) -> None:
    """Raises UserError that names what differs if a checkpoint, at `where`, is of another run.

    A checkpoint that names no objective was made with SFT, and one that says nothing of a probe may
    go on with any.
    """
    saved = {"objective": settings_of(SFT()), **saved}
    if "data" in saved and "probe" not in saved["data"]:
        saved["data"] = {**saved["data"], "probe": current["data"].get("probe")}
    changes = [f"{section}, now without" for section in saved if section not in current]
    changes += [f"no {section}, now with one" for section in current if section not in saved]
    for section in current:
        if section in saved:
            changes += _changes(section, saved[section], current[section])
    if changes:
        shown = "; ".join(changes[:_SHOWN])
        more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise UserError(
            f"{where}: made with {shown}{more}: change it back to continue, or choose another "
            "output_dir"
        )


def tell_rounding(before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Logs differences that change only how numbers are rounded."""
    before = {"processes": 1, **before}  # checkpoints of earlier versions do not say
    changed = [
        f"{name}={before.get(name)}, now {name}={now[name]}"
        for name in now
        if before.get(name) != now[name]
    ]
    if changed:
        logger.warning("the same run, but for rounding: made with %s", "; ".join(changed))


def _changes(section: str, before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    # Other versions of the libraries have more fields, or fewer.
    names = before.keys() & now.keys() if _is_library(section) else before.keys() | now.keys()
    place = "" if section == "settings" else f" ({section})"
    changes = []
    for name in sorted(names):
        values = [before.get(name), now.get(name)]
        if values[0] == values[1] or name.startswith("_"):
            continue
        if name == "weights" and before.get("dtype") != now.get("dtype"):
            continue  # they are hashed as they are held: the dtype is what differs
        if any(str(value).startswith(_HASH) for value in values):
            models = [f"{side['_name']}" for side in (before, now) if side.get("_name")]
            what = _HASHED.get(name, f"another {name}{place}")
            changes.append(what + (f" ({', now '.join(models)})" if models else ""))
        else:
            changes.append(f"{name}={_short(values[0])}, now {name}={_short(values[1])}{place}")
    return changes


def _is_library(section: str) -> bool:
    return section == "model's config" or section.startswith("adapter ")


def _adapters(model: nn.Module) -> Identity:
    configs = getattr(model, "peft_config", {})
    return {f"adapter {n}": _compared(configs[n].to_dict()) for n in active_adapters(model)}


def _compared(config: Mapping[str, object]) -> dict[str, object]:
    return {
        name: value
        for name, value in config.items()
        if name not in _NOT_COMPARED and not name.startswith("_")
    }


def _weights_sha256(model: nn.Module, parameters: set[str]) -> str:
    """Of these parameters and of the buffers that belong to a model's files."""
    saved = model.state_dict().keys()
    buffers = [(name, b) for name, b in model.named_buffers() if name in saved]
    chosen = [
        (name.replace(".base_layer.", "."), p)  # with or without an adapter around it
        for name, p in model.named_parameters()
        if name in parameters
    ]
    return tensors_sha256([*buffers, *chosen, *_on_disk(model)])


def _on_disk(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The checksums of weights that wait in a file: their parameters hold nothing."""
    return [
        (f"{name}.stored", torch.tensor(list(bytes.fromhex(module.sharded.sha256))))
        for name, module in model.named_modules()
        if isinstance(module, ShardedLinear) and isinstance(module.sharded, StoredWeight)
    ]


def _vocabulary(tokenizer: Tokenizer | None) -> str | None:
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    return _HASH + tokenizer_sha256(tokenizer)


def _dtypes(model: nn.Module) -> str:
    """The number formats of the floating-point parameters: "bfloat16, float32"."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return ", ".join(sorted(dtypes))


def _hashed(value: object) -> str | None:
    return None if value is None else _HASH + json_sha256(value)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _as_json(value: object) -> object:
    """What JSON does not know, such as PEFT's sets of names and the types of its adapters.

    Equal values of another process have an equal one: of an array all elements, not what is printed
    of it, and of a function its name, not its address.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        return _HASH + tensors_sha256([("", value)])
    if isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return str(value)
