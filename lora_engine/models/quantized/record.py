"""What a model's configuration says of its packed linears, for whoever reads its folder."""

from torch import nn

from lora_engine.models.families.modules import Config
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.quantization.blockwise_4bit import Blockwise4bit


def record_quantization(model: nn.Module) -> None:
    """Sets `model.config.quantization_config`, which `save_pretrained` writes to config.json.

    NF4 and FP4 alone are stated as bitsandbytes', whose files transformers reads by itself. Models
    without packed linears or without a configuration stay as they are.
    """
    formats = {m.format for m in model.modules() if isinstance(m, QuantizedLinear)}
    config: Config | None = getattr(model, "config", None)
    if not formats or config is None:
        return
    blockwise = [format for format in formats if isinstance(format, Blockwise4bit)]
    kinds = {(format.code, format.nested) for format in blockwise}
    if len(blockwise) < len(formats) or len(kinds) > 1:
        config.quantization_config = {"quant_method": "lora_engine"}
        return
    dtypes = {m.dtype for m in model.modules() if isinstance(m, QuantizedLinear)}
    [(code, nested)] = kinds
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": code,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": str(next(iter(dtypes))).removeprefix("torch."),
        "llm_int8_skip_modules": [n for n, m in model.named_modules() if type(m) is nn.Linear],
    }
