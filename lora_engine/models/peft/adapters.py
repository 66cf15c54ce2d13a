"""The adapters of a run: their section of the configuration, and PEFT's layers made from it."""

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from lora_engine.errors import UserError

if TYPE_CHECKING:  # neither is needed to read a configuration
    from torch import nn

    from lora_engine.models.families.modules import PeftCausalLm

LONGEST_NAME = 64

# Parts of the names of PEFT's own modules. PEFT takes an adapter's tensors from a model by the
# adapter's name as a part of theirs, so that none of these can be one.
_PEFT_PARTS = (
    "base_layer",
    "base_model",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "model",
    "modules_to_save",
    "original_module",
    "weight",
    "bias",
)

# float32 weights, gradients and two moments.
_BYTES_PER_VALUE = 16


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _can_name_an_adapter(name: str) -> str:
    """An adapter's name is that of a folder and of a module in a torch ModuleDict."""
    from torch import nn

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(
            f"{_shown(name)} cannot name an adapter: use letters, digits, _ and -, "
            "a letter or digit first"
        )
    if len(name) > LONGEST_NAME:
        raise ValueError(f"{_shown(name)} is longer than {LONGEST_NAME} characters")
    if name in _PEFT_PARTS or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"{name!r} is a name that torch or PEFT use themselves; take another")
    return name


AdapterName = Annotated[str, AfterValidator(_can_name_an_adapter)]


class AdapterConfig(_Section):
    """One of several adapters; what it leaves out is as `lora` has it."""

    r: int | None = Field(default=None, ge=1, le=10**6, description="Rank of the adapter.")
    alpha: float | None = Field(
        default=None, gt=0, le=10**6, description="Scale: its output is multiplied by alpha / r."
    )
    target_modules: str | list[str] | None = Field(
        default=None, description="Which linear layers get it."
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="Its peak learning rate, instead of `train.learning_rate`.",
    )

    @field_validator("target_modules")
    @classmethod
    def _names_a_module(cls, value: str | list[str] | None) -> str | list[str] | None:
        return _not_empty(value)


class LoraConfig(_Section):
    """The LoRA adapter, handed on to `peft.LoraConfig`."""

    r: int = Field(default=16, ge=1, le=10**6, description="Rank of the adapter.")
    alpha: float = Field(
        default=32,
        gt=0,
        le=10**6,
        description="Scale: the adapter's output is multiplied by alpha / r.",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="Which linear layers get an adapter: `all-linear`, names such as "
        "`[q_proj, v_proj]`, or a regular expression for whole names.",
    )
    exclude_modules: str | list[str] | None = Field(
        default=None, description="Names, or a regular expression, of layers to leave out."
    )
    rslora: bool = Field(default=False, description="Scale by alpha / √r instead (rsLoRA).")
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Which bias terms are trained too."
    )
    modules_to_save: list[str] | None = Field(
        default=None,
        description="Modules trained in full and saved with the adapter, e.g. `[lm_head]`.",
    )
    ensure_weight_tying: bool = Field(
        default=False,
        description="What is trained of an embedding is trained of the output head that is tied "
        "to it, and the other way round; without it the two part.",
    )
    merge_aware: bool = Field(
        default=False,
        description="Train over the weights that will be served: for every product the adapter is "
        "merged into the base's weights, and these are put into the packed bits of "
        "`model.quantize` (docs/deployment.md).",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of the adapter's random initial values."
    )
    adapters: dict[AdapterName, AdapterConfig] | None = Field(
        default=None,
        description="Several adapters over one base, by name: each learns from the records whose "
        "field `adapter` names it, and is saved in a folder of that name.",
    )

    @field_validator("target_modules")
    @classmethod
    def _names_a_module(cls, value: str | list[str]) -> str | list[str] | None:
        return _not_empty(value)

    @model_validator(mode="after")
    def _can_be_merged(self) -> "LoraConfig":
        if self.merge_aware and self.dropout:
            raise ValueError("merge_aware: what is served has no dropout; set dropout to 0")
        if self.merge_aware and self.adapters is not None:
            raise ValueError("merge_aware: weights are merged with one adapter; leave adapters out")
        return self

    @model_validator(mode="after")
    def _adapters_can_be_routed(self) -> "LoraConfig":
        if self.adapters is None:
            return self
        if not self.adapters:
            raise ValueError("adapters names none; leave it out for one adapter")
        lower: dict[str, str] = {}
        for name in self.adapters:
            other = lower.setdefault(name.lower(), name)
            if other != name:
                raise ValueError(
                    f"adapters: {other!r} and {name!r} are one folder where case makes no "
                    "difference; rename one"
                )
        if len(self.adapters) > 1 and (self.bias != "none" or self.modules_to_save):
            raise ValueError("bias and modules_to_save are for one adapter, not several")
        return self

    def of_adapters(self) -> dict[str, "LoraConfig"]:
        """Each adapter's own settings, by its name; `default` is PEFT's name for the only one."""
        if self.adapters is None:
            return {"default": self}
        return {
            name: self.model_copy(
                update={
                    "adapters": None,
                    **adapter.model_dump(exclude_none=True, exclude={"learning_rate"}),
                }
            )
            for name, adapter in self.adapters.items()
        }

    def key(self, adapter: str, field: str) -> str:
        """The key that gave a field of one of `of_adapters`: `lora.adapters.a.r`, or `lora.r`."""
        own = (self.adapters or {}).get(adapter)
        return f"lora.adapters.{adapter}.{field}" if getattr(own, field, None) else f"lora.{field}"


def add_adapters(model: "nn.Module", lora: LoraConfig) -> "PeftCausalLm":
    """`model` in a PeftModel with the LoRA adapters that `lora` describes, all of them active.

    Each is initialised from lora.seed. Raises UserError, naming the key, for a name or pattern
    that matches no module, for a rank that makes no sense for the model or its memory, and for
    whatever else PEFT refuses.
    """
    import peft
    import torch

    from lora_engine.models.peft.module_names import check_modules

    parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
    settings = lora.of_adapters()
    for name, own in settings.items():
        if name in parts:
            raise UserError(
                f"lora.adapters: {name!r} is a part of the names of the model's weights, where "
                "PEFT looks for adapters' names; take another"
            )
        adapted = check_modules(
            model,
            target_modules=own.target_modules,
            exclude_modules=own.exclude_modules,
            modules_to_save=own.modules_to_save,
            key=lambda field, adapter=name: lora.key(adapter, field),  # type: ignore[misc]
        )
        _check_rank(adapted, own.r, lora.key(name, "r"))
        _check_saved(model, own.modules_to_save or (), lora.key(name, "modules_to_save"))
    wrapped: PeftCausalLm | None = None
    for name, own in settings.items():
        torch.manual_seed(lora.seed)
        with _user_errors(lora, name):
            if wrapped is None:
                wrapped = peft.get_peft_model(model, _peft_config(own, model), adapter_name=name)
            else:
                wrapped.add_adapter(name, _peft_config(own, model))
    assert wrapped is not None
    if len(settings) > 1:
        wrapped.base_model.set_adapter(list(settings))
    _check_bias(wrapped, lora)
    return wrapped


def _peft_config(lora: LoraConfig, model: "nn.Module") -> object:
    import peft

    return peft.LoraConfig(
        # A classifier's head, a reward model's say, is trained in full and saved with the adapter.
        task_type="SEQ_CLS" if getattr(model, "score", None) is not None else "CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
        use_rslora=lora.rslora,
        bias=lora.bias,
        modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,
        ensure_weight_tying=lora.ensure_weight_tying,
    )


@contextmanager
def _user_errors(lora: LoraConfig, name: str) -> Iterator[None]:
    """What PEFT and torch raise, or only warn of, about an adapter's settings, as one line."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            yield
        except (ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{lora.key(name, 'target_modules')}: {reason}") from error
        except (MemoryError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{lora.key(name, 'r')}: the adapter could not be made: {reason}; take a smaller "
                "rank or fewer target_modules"
            ) from error
    for warning in told:
        if str(warning.message).startswith("You have requested `ensure_weight_tying`"):
            raise UserError(
                "lora.ensure_weight_tying: there is nothing to tie: the model's head is its own, "
                "or neither head nor embedding are in target_modules or modules_to_save"
            )
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _check_saved(model: "nn.Module", saved: Sequence[str], key: str) -> None:
    """Refuses to train the weights of a linear that is kept in packed bits."""
    from lora_engine.models.quantized.linear import QuantizedLinear
    from lora_engine.models.sharded.linear import ShardedLinear

    for path, module in model.named_modules():
        named = [name for name in saved if path == name or path.endswith(f".{name}")]
        if named and isinstance(module, QuantizedLinear):
            raise UserError(
                f"{key}: {named[0]!r} names {path}, whose weight is in packed bits, which are "
                "frozen; put it into model.quantize_skip, or adapt it by target_modules"
            )
        if named and isinstance(module, ShardedLinear):
            raise UserError(
                f"{key}: {named[0]!r} names {path}, whose weight is in shards, which are frozen; "
                "leave model.shard out, or adapt it by target_modules"
            )


def _check_rank(adapted: Sequence["nn.Module"], r: int, key: str) -> None:
    """Refuses a rank beyond the layers' own sizes, and one that the memory cannot hold."""
    import torch

    from lora_engine import backends

    sizes = [_sizes(module) for module in adapted]
    widest = (
        max(
            (min(s) if isinstance(m, torch.nn.Embedding) else max(s))
            for m, s in zip(adapted, sizes, strict=True)
        )
        if sizes
        else r
    )
    if r > widest:
        raise UserError(
            f"{key}: {r:,} is more than the widest layer it is for, {widest:,}: the adapter would "
            "be larger than the layer; ranks from 8 to 256 are usual"
        )
    needed = _BYTES_PER_VALUE * r * sum(map(sum, sizes))
    devices = (p.device for module in adapted for p in module.parameters())
    memory = backends.memory(next(devices, torch.device("cpu")))
    if needed > memory.nbytes:
        raise UserError(
            f"{key}: adapters of rank {r:,} take {needed / 2**30:,.1f} GiB to train, "
            f"{memory.owner} has {memory.nbytes / 2**30:,.1f}; take a smaller rank or "
            "fewer target_modules"
        )


def _sizes(module: "nn.Module") -> tuple[int, int]:
    """Rows and columns of the matrix an adapter is for."""
    import torch

    if isinstance(module, torch.nn.Linear):  # also one whose values are packed
        return module.out_features, module.in_features
    rows, *columns = next(module.parameters()).shape
    return rows, math.prod(columns)


def _check_bias(model: "nn.Module", lora: LoraConfig) -> None:
    trained = (name for name, p in model.named_parameters() if p.requires_grad)
    if lora.bias != "none" and not any(name.endswith("bias") for name in trained):
        where = "the model" if lora.bias == "all" else "what gets an adapter"
        raise UserError(f"lora.bias: {where} has no bias terms to train; leave it at none")


def _not_empty(value: str | list[str] | None) -> str | list[str] | None:
    if value is not None and not value:
        raise ValueError("names no module; give names, a pattern, or all-linear")
    return value


def _shown(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:37] + "…")
