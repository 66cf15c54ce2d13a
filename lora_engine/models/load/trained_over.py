"""How the base's linears were kept when an adapter was trained: noted in the adapter's folder."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from lora_engine.models.attach.head import transformers_model
from lora_engine.models.proof.closeness import coarsest_dtype
from lora_engine.models.quantized.merge_aware_linear import MergeAwareLinear
from lora_engine.models.quantized.stored import decoded_dtype, stored_weight, why_not_stored
from lora_engine.quantization.blockwise_4bit import Blockwise4bit
from lora_engine.quantization.format import Format
from lora_engine.quantization.formats import WRITABLE, writable_format

TRAINED_OVER_FILE = "trained_over.json"


@dataclass(frozen=True)
class TrainedOver:
    """What an adapter learned over.

    merge_aware: whether the adapter was merged into the weights that it learned over, as it is
        served; else it was beside them.
    formats: of the base's packed linears; empty: none are.
    quantize, double_quant: the format as `quantize_weight` takes it; None where there is not one.
    quantize_skip: the names of the linears that are not packed, of a model that has packed ones.
    dtype: that the linears' weights have, or decode to.
    """

    merge_aware: bool
    formats: tuple[str, ...]
    quantize: str | None
    double_quant: bool
    quantize_skip: tuple[str, ...]
    dtype: str

    def __str__(self) -> str:
        """For people."""
        if not self.formats:
            return f"weights in {self.dtype}"
        packed = "/".join(self.formats) + (" with double_quant" if self.double_quant else "")
        return f"weights that it was merged into, in {packed}" if self.merge_aware else packed


def trained_over(model: nn.Module) -> TrainedOver:
    """How the linears of a model with adapters are kept."""
    dtype = coarsest_dtype(model)
    formats, dense, merge_aware = dict[Format, None](), [], False
    for name, linear in _linears(transformers_model(model)):
        weight = None if why_not_stored(linear) else stored_weight(linear, dtype)
        format: Format | None = getattr(weight, "format", None)
        if format is None:
            dense.append(name)
            continue
        formats[format] = None
        dtype = decoded_dtype(linear, dtype)
        merge_aware |= isinstance(linear, MergeAwareLinear)
    quantize, double_quant = _written_as(formats)
    return TrainedOver(
        merge_aware=merge_aware,
        formats=tuple(dict.fromkeys(format.name for format in formats)),
        quantize=quantize,
        double_quant=double_quant,
        quantize_skip=tuple(dense) if formats else (),
        dtype=str(dtype).removeprefix("torch."),
    )


def write_trained_over(folder: Path, over: TrainedOver) -> None:
    """Note in an adapter's `folder` what it learned over."""
    text = json.dumps(asdict(over), indent=2, sort_keys=True) + "\n"
    (folder / TRAINED_OVER_FILE).write_text(text, encoding="utf-8")


def read_trained_over(folder: Path) -> TrainedOver | None:
    """What `write_trained_over` noted; None for an adapter that others saved."""
    try:
        known = json.loads((folder / TRAINED_OVER_FILE).read_text(encoding="utf-8"))
        return TrainedOver(
            merge_aware=bool(known["merge_aware"]),
            formats=tuple(map(str, known["formats"])),
            quantize=None if known["quantize"] is None else str(known["quantize"]),
            double_quant=bool(known["double_quant"]),
            quantize_skip=tuple(map(str, known["quantize_skip"])),
            dtype=str(known["dtype"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _linears(model: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    """The base's own linears by their names there, without those of adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters: set[nn.Module] = set()
    for prefix, module in model.named_modules():
        if module in adapters:
            continue
        if isinstance(module, BaseTunerLayer):
            adapters |= {part for part in module.modules() if part is not module}
            module = module.get_base_layer()
        if isinstance(module, nn.Linear):
            yield prefix, module


def _written_as(formats: Iterable[Format]) -> tuple[str | None, bool]:
    """`quantize` and `double_quant` that write the one format; None if there is none or several."""
    found = list(formats)
    if len(found) != 1:
        return None, False
    double_quant = isinstance(found[0], Blockwise4bit) and found[0].nested
    for name in WRITABLE:
        if double_quant and name not in ("nf4", "fp4"):
            continue
        if writable_format(name, None, double_quant) == found[0]:
            return name, double_quant
    return None, False
