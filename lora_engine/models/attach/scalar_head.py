"""The head that makes one number of a hidden state: of a reward model, or of a policy's values."""

from collections.abc import Callable

from torch import Tensor, nn

from lora_engine.errors import UserError
from lora_engine.models.attach.head import transformers_model


def scalar_head(
    model: nn.Module,
) -> Callable[[Tensor], Tensor]:  # [U, H] -> [U]
    """The model's scalar head as it is now, PEFT's copy of it included, in float32 or more.

    `score`, as transformers' sequence classifiers call it, or the `value_head` of a policy.

    Raises UserError where there is none, or it makes more than one number.
    """
    inner = transformers_model(model)
    head = getattr(inner, "score", None) or getattr(inner, "value_head", None)
    if not isinstance(head, nn.Module):
        raise UserError(
            f"{type(inner).__name__} has no scalar head (score or value_head); make one with "
            "lora_engine.with_scalar_head(model)"
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
