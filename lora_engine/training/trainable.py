"""Which of a model's parameters are trained, by patterns of their names."""

import re
from collections.abc import Sequence

from torch import nn

from lora_engine.errors import UserError, nearest
from lora_engine.models.peft.routing import is_peft


def trained_names(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the parameters, tied ones by each of theirs, in which a pattern is found.

    Raises UserError for a pattern that is no regular expression, or is found in no name.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    trained: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UserError(
                f"train.trainable: {pattern!r} is no regular expression: {error}"
            ) from error
        if not found:
            parts = {part for name in names for part in name.split(".")}
            close = nearest(pattern, {*names, *parts})
            hint = f"; did you mean {close}?" if close else f"; the first is {names[0]}"
            raise UserError(f"train.trainable: {pattern!r} is found in no parameter's name{hint}")
        trained |= found
    return trained


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Trains the parameters in whose names a pattern is found, and freezes the others.

    Raises UserError as `trained_names`, for a model with adapters and for one whose weights are in
    packed bits there.
    """
    if is_peft(model):
        raise UserError(
            "train.trainable: the model has adapters, which are trained; set lora: null, or name "
            "modules in lora.modules_to_save"
        )
    names = trained_names(model, patterns)
    chosen = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    for name, parameter in model.named_parameters():
        if id(parameter) in chosen and not parameter.is_floating_point():
            raise UserError(
                f"train.trainable: {name} is {parameter.dtype}, which cannot be trained"
            )
        parameter.requires_grad = id(parameter) in chosen
