"""The head that makes one number of a hidden state: of a reward model, or of a policy's values."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lora_engine.errors import UserError
from lora_engine.models.attach.head import transformers_model

# What models call it: transformers' sequence classifiers, and policies with values.
NAMES = ("score", "value_head")


def scalar_head(
    model: nn.Module,
) -> Callable[[Tensor], Tensor]:  # [U, H] -> [U]
    """The model's scalar head as it is now, PEFT's copy of it included, in float32 or more.

    Raises UserError where there is none, or it makes more than one number.
    """
    inner: Any = transformers_model(model)
    head = next((found for name in NAMES if (found := getattr(inner, name, None))), None)
    if not isinstance(head, nn.Module):
        raise UserError(
            f"{type(inner).__name__} has no scalar head ({' or '.join(NAMES)}); load the model "
            'with lora_engine.load_model(source, head="scalar")'
        )
    weight = next(head.parameters())

    def values(hidden: Tensor) -> Tensor:
        made: Tensor = head(hidden.to(weight.dtype))
        if made.shape[-1] != 1:
            raise UserError(
                f"{type(inner).__name__}: its head makes {made.shape[-1]} numbers of a token, "
                "expected one; load it with num_labels=1"
            )
        return made[:, 0].float() if made.dtype.itemsize < 4 else made[:, 0]

    return values
