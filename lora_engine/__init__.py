"""lora_engine: a performance engine for fine-tuning language models.

The public names load on first use, so that `import lora_engine` stays cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora_engine import openmp

openmp.settle()  # before anything below imports torch, which loads the OpenMP runtime

__version__ = "0.1.0"

_PUBLIC = {
    "accelerate": "lora_engine.models.attach.accelerate",
    "restore": "lora_engine.models.attach.accelerate",
    "route_adapters": "lora_engine.models.peft.routing",
    "load_model": "lora_engine.models.load.load",
    "make_merge_aware": "lora_engine.models.peft.merge_aware",
    "with_scalar_head": "lora_engine.models.load.scalar",
    "quantize_model": "lora_engine.models.quantized.quantize",
    "quantize_weight": "lora_engine.ops.quantized_weight",
    "QuantizedWeight": "lora_engine.ops.quantized_weight",
    "preflight": "lora_engine.training.preflight.preflight",
    "Trainer": "lora_engine.training.trainer",
    "TrainConfig": "lora_engine.training.config",
    "UserError": "lora_engine.errors",
}
_MODULES = (
    "ops",
    "reference",
    "backends",
    "data",
    "models",
    "objectives",
    "training",
    "evaluation",
)

__all__ = ["__version__", *_PUBLIC, *_MODULES]

if TYPE_CHECKING:
    from lora_engine.errors import UserError as UserError
    from lora_engine.models.attach.accelerate import accelerate as accelerate
    from lora_engine.models.attach.accelerate import restore as restore
    from lora_engine.models.load.load import load_model as load_model
    from lora_engine.models.load.scalar import with_scalar_head as with_scalar_head
    from lora_engine.models.peft.merge_aware import make_merge_aware as make_merge_aware
    from lora_engine.models.peft.routing import route_adapters as route_adapters
    from lora_engine.models.quantized.quantize import quantize_model as quantize_model
    from lora_engine.ops.quantized_weight import QuantizedWeight as QuantizedWeight
    from lora_engine.ops.quantized_weight import quantize_weight as quantize_weight
    from lora_engine.training.config import TrainConfig as TrainConfig
    from lora_engine.training.preflight.preflight import preflight as preflight
    from lora_engine.training.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
