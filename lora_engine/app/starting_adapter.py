"""`model.adapter`: a run that goes on with an adapter instead of making one."""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.app.config import RunConfig
from lora_engine.app.objectives import objective_of
from lora_engine.app.trained import check_base, find_trained
from lora_engine.errors import EngineWarning, UserError
from lora_engine.export.adapter import Adapter
from lora_engine.models.load.scalar import VALUE_HEAD_FILE
from lora_engine.models.load.trained_over import read_trained_over, trained_over
from lora_engine.models.peft.adapters import LoraConfig
from lora_engine.models.peft.routing import REFERENCE_ADAPTER
from lora_engine.objectives.online import as_online

if TYPE_CHECKING:
    from torch import nn

    from lora_engine.models.families.modules import PeftCausalLm

# PEFT's fields by those of `lora`; PEFT itself reads these and all others of the adapter.
_FIELDS = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "rslora": "use_rslora",
    "bias": "bias",
    "modules_to_save": "modules_to_save",
}


@dataclass(frozen=True)
class StartingAdapter:
    """folder: of the adapter. lora: its settings, as a run's. sha256: of its weights, and of its
    value head's where the objective trains one. compares: the objective has a reference, which is
    the model with the adapter as it is now."""

    folder: Path
    lora: LoraConfig
    sha256: str
    compares: bool


def starting_adapter(config: RunConfig) -> StartingAdapter | None:
    """The adapter that `config` goes on with; None if it makes one.

    Raises UserError for a folder without one adapter, one that is not LoRA or of another base, and
    settings in `lora` that are not the adapter's.
    """
    source = config.model.adapter
    if source is None:
        return None
    trained = find_trained(source, config.model.path)
    if len(trained.adapters) != 1:
        inside = ", ".join(str(folder) for folder in trained.adapters.values())
        what = f"holds several adapters; give one of {inside}" if inside else "holds a whole model"
        mend = "" if inside else "; give it as model.path"
        raise UserError(f"model.adapter: {source} {what}{mend}")
    (read,) = trained.choose([])[1]
    if Path(config.model.path).is_dir():
        check_base(Path(config.model.path), [read])
    adapter, _ = read
    own = _settings(adapter, config)
    problem = config.model_copy(update={"lora": own}).why_not_merge_aware()
    if problem is not None:
        raise UserError(f"model.adapter: {source} is merge-aware; {problem}")
    usual = LoraConfig(seed=own.seed, merge_aware=own.merge_aware)
    if config.lora is not None and config.lora not in (own, usual, LoraConfig(seed=own.seed)):
        raise UserError(
            f"lora: the adapter in {source} keeps its settings (r {own.r}, alpha {own.alpha:g}); "
            "leave lora out"
        )
    objective = objective_of(config.objective)
    online = as_online(objective)
    compares = objective.reads.reference or (online is not None and online.compares)
    weights = (adapter.folder / "adapter_model.safetensors").read_bytes()
    values = adapter.folder / VALUE_HEAD_FILE
    if objective.reads.values_targets and values.is_file():
        weights += values.read_bytes()
    return StartingAdapter(
        folder=adapter.folder,
        lora=own,
        sha256=hashlib.sha256(weights).hexdigest(),
        compares=compares,
    )


def going_on(model: "nn.Module", start: StartingAdapter) -> "PeftCausalLm":
    """`model` in a PeftModel with the adapter, to be trained; its values in float32.

    Where the objective compares, a frozen copy of the adapter is beside it: REFERENCE_ADAPTER.
    """
    import peft

    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            wrapped: PeftCausalLm = peft.PeftModel.from_pretrained(
                model, start.folder, is_trainable=True
            )
            if start.compares:
                wrapped.load_adapter(start.folder, REFERENCE_ADAPTER, is_trainable=False)
                wrapped.set_adapter("default")
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.adapter: {start.folder} does not fit the model; give the one it was trained "
            f"on: {reason}"
        ) from error
    missing = [str(w.message) for w in told if "missing adapter keys" in str(w.message)]
    if missing:
        raise UserError(
            f"model.adapter: {start.folder} has no values for a part of the model that its "
            f"settings name; get the complete adapter: {missing[0][:300]}"
        )
    return wrapped


def _settings(adapter: Adapter, config: RunConfig) -> LoraConfig:
    given: dict[str, Any] = {
        ours: adapter.settings[theirs]
        for ours, theirs in _FIELDS.items()
        if adapter.settings.get(theirs) is not None
    }
    if isinstance(given.get("target_modules"), list):
        given["target_modules"] = sorted(given["target_modules"])
    seed = config.lora.seed if config.lora is not None else 0
    over = read_trained_over(adapter.folder)
    merge_aware = over is not None and over.merge_aware
    if config.lora is not None and "merge_aware" in config.lora.model_fields_set:
        merge_aware = config.lora.merge_aware
    return LoraConfig.model_validate({**given, "seed": seed, "merge_aware": merge_aware})


def tell_other_weights(start: StartingAdapter, model: "nn.Module") -> None:
    """Warns where the adapter learned over other packed bits than `model` has, with it in them or
    beside them."""
    before, now = read_trained_over(start.folder), trained_over(model)
    if before is None:
        return
    if (before.formats, before.double_quant, before.merge_aware) != (
        *(now.formats, now.double_quant, now.merge_aware),
    ):
        warnings.warn(
            f"model.adapter: {start.folder} learned over {before}, and goes on over {now}; "
            "model.quantize and lora.merge_aware say which",
            EngineWarning,
            stacklevel=2,
        )
