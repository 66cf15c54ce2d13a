"""A linear over a weight in packed bits, as a module of its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_engine.ops import QuantizedWeight
from lora_engine.ops.frozen_product import frozen_product
from lora_engine.quantization.blockwise_4bit import Blockwise4bit


class QuantizedLinear(nn.Linear):
    """A linear whose frozen weight is kept in packed bits and decoded for each product.

    weight: the codes as a parameter, of NF4 and FP4 [ceil(N K / 2), 1] uint8 as bitsandbytes keeps
    them; the state dict has the keys of `QuantizedWeight.state_dict`. It moves with the module from
    device to device, but keeps its scales and the dtype it decodes to when the module's dtype is
    changed. PEFT puts its LoRA layers around it as around any linear; their `merge` cannot write
    into packed bits.
    """

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.format, self.dtype = quantized.format, quantized.dtype
        tensors = dict(quantized.tensors)
        codes = tensors.pop("codes")
        self._codes_shape = codes.shape
        self.weight = nn.Parameter(_as_parameter(codes), requires_grad=False)
        self.register_parameter("bias", None)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self._scales = tensors  # no buffers: a change of dtype would round them

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight, over this module's own memory."""
        codes = self.weight.detach().view(self._codes_shape)
        tensors = {"codes": codes, **self._scales}
        return QuantizedWeight(
            format=self.format,
            tensors=tensors,
            shape=(self.out_features, self.in_features),
            dtype=self.dtype,
        )

    def dequantize(self) -> Tensor:
        """The weight [N, K] that the bits stand for, in memory of its own."""
        return self.quantized.dequantize()

    @property
    def W_q(self) -> Tensor:
        """The codes. PEFT asks a linear with such an attribute for `dequantize()`, as for DoRA."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] times the decoded weight, plus the bias: [..., N], in input's dtype.

        Raises ValueError for an input that is not floating point.
        """
        if not input.is_floating_point():
            raise ValueError(
                f"the input of {self} is {input.dtype}; a model that casts to the dtype of this "
                "layer's weight needs the layer in quantize_model's skip"
            )
        y = frozen_product(input, self.quantized.dequantize)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        if isinstance(self.format, Blockwise4bit):
            of = self.format
            kind = f"{of.name}, block={of.block}, double_quant={of.nested}"
        else:
            kind = str(self.format)
        return f"{super().extra_repr()}, {kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        super()._apply(fn, recurse)
        self._scales = {name: x.to(self.weight.device) for name, x in self._scales.items()}
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        entries = self.quantized.state_dict(f"{prefix}weight")
        destination.update({k: v for k, v in entries.items() if k not in destination})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, object],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        others = {k: v for k, v in state_dict.items() if k != name and not k.startswith(f"{name}.")}
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if len(others) == len(state_dict):  # nothing of the weight, as in a file of adapters
            super()._load_from_state_dict(others, prefix, *rest)
            return
        try:
            read = QuantizedWeight.from_state_dict(state_dict, name)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if (read.format, read.shape) != (self.format, (self.out_features, self.in_features)):
            error_msgs.append(f"{name}: is {read.format} {list(read.shape)}, expected {self}")
            return
        tensors = dict(read.tensors)
        others[name] = _as_parameter(tensors.pop("codes"))
        if local_metadata.get("assign_to_params_buffers", False):
            self._scales = tensors
        elif self._has_table_of(tensors):
            self._copy_scales(tensors)
        else:
            error_msgs.append(f"{name}: nested_quant_map is another table than {self} has")
            return
        super()._load_from_state_dict(others, prefix, *rest)

    def _has_table_of(self, tensors: dict[str, Tensor]) -> bool:
        mine, theirs = self._scales.get("nested_code"), tensors.get("nested_code")
        if mine is None or theirs is None or mine.is_meta:
            return True
        return torch.equal(mine, theirs.to(mine.device))

    def _copy_scales(self, tensors: dict[str, Tensor]) -> None:
        """Writes scales where this module's are, which `accelerate` may hold already."""
        for name, tensor in tensors.items():
            if name != "nested_code":  # one table for all weights
                self._scales[name].copy_(tensor)


def _as_parameter(codes: Tensor) -> Tensor:
    """The codes as a module shows them: one column where they are a vector."""
    return codes.view(-1, 1) if codes.dim() == 1 else codes
