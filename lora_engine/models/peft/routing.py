"""Several adapters over one base in one batch: which rows use which."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

from lora_engine.errors import UserError
from lora_engine.models.attach.attachment import attachment
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.families.modules import PeftCausalLm
from lora_engine.models.peft.lora_state import is_lora, is_saved_whole


def is_peft(model: nn.Module) -> TypeGuard[PeftCausalLm]:
    """Whether PEFT has put adapters into the model."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


# A frozen copy of the adapter that a run goes on with, for objectives that compare with it.
REFERENCE_ADAPTER = "frozen_reference"


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The adapters of a PeftModel that are active; none for other models."""
    return tuple(model.active_adapters) if is_peft(model) else ()


class RoutedTokens(Protocol):
    """What of a batch says which adapter its rows use (`data.batch.PackedBatch` has it)."""

    @property
    def cu_seqlens(self) -> Tensor: ...  # [S + 1] int32
    @property
    def num_rows(self) -> int: ...  # T
    @property
    def adapters(self) -> Sequence[str]: ...  # S names, or none


def is_routed(model: nn.Module, batch: RoutedTokens) -> bool:
    """Whether the batch's rows run through different adapters."""
    return bool(batch.adapters) and len(active_adapters(model)) > 1


def adapters_of(model: nn.Module, batch: RoutedTokens) -> AbstractContextManager[None]:
    """Within this context the model runs each of the batch's rows through its adapter."""
    if not is_routed(model, batch):
        return nullcontext()
    names = active_adapters(model)
    numbers = torch.tensor([names.index(adapter) for adapter in batch.adapters])
    lengths = batch.cu_seqlens.diff()
    rows = torch.repeat_interleave(numbers.to(lengths.device), lengths, output_size=batch.num_rows)
    return route_adapters(model, names, rows)


def _why_not(model: nn.Module) -> str | None:
    """What of the model is one for all adapters, so that rows cannot choose."""
    head = transformers_model(model).get_output_embeddings()
    if head is not None and is_lora(head):
        return "LoRA on the output head"
    if any(map(is_saved_whole, model.modules())):
        return "a module trained in full (modules_to_save)"
    return None


def _checked(rows: Tensor, count: int) -> Tensor:
    """`rows` [tokens], each from -1 to count - 1."""
    if rows.dtype != torch.int64:
        raise UserError(f"route_adapters: rows are {rows.dtype}, expected torch.int64")
    if rows.numel():
        least, most = (value.item() for value in torch.aminmax(rows))
        if least < -1 or most >= count:
            raise UserError(
                f"route_adapters: rows go from {least} to {most}; expected 0 to {count - 1}, "
                "the adapters by their place in names, or -1 for none"
            )
    return rows.reshape(-1)


@contextmanager
def route_adapters(model: nn.Module, names: Sequence[str], rows: Tensor) -> Iterator[None]:
    """Within this context row i of a batch uses the adapter `names[rows[i]]` of PEFT, and no other.

    `rows` [B, L] or [B * L] int64, one for each token; -1 for the base model alone. The adapters
    may have any ranks and scalings; each gets the gradients it would get if its rows were trained
    alone, so long as no sequence mixes adapters. All of them have to be active
    (`model.base_model.set_adapter([...])`) when `accelerate(model)` is called, which makes room
    for their ranks. The backward pass may run outside the context,
    unless layers are checkpointed: then they run again in it.

    Raises UserError for models that are not accelerated, for adapters that are unknown or not
    active, for rows that are no numbers of `names`, for LoRA on the output head and
    `modules_to_save` and, when the model is called, for a batch of more or fewer tokens and for
    layers that run as PEFT's own.
    """
    attached = attachment(transformers_model(model))
    if attached is None:
        raise UserError("route_adapters: call lora_engine.accelerate(model) first")
    if isinstance(names, str):
        raise UserError(f"route_adapters: names is a text; give a list, [{names!r}]")
    known, active = list(model.peft_config) if is_peft(model) else [], active_adapters(model)
    for name in names:
        if name not in known:
            raise UserError(f"route_adapters: no adapter {name!r}; there are {', '.join(known)}")
        if name not in active:
            raise UserError(
                f"route_adapters: adapter {name!r} is not active; "
                f"model.base_model.set_adapter({list(names)!r}) activates several"
            )
    if (problem := _why_not(model)) is not None:
        raise UserError(f"route_adapters: {problem} cannot be routed by row")
    router = attached.router
    before = router.names, router.rows
    router.names, router.rows = tuple(names), _checked(rows, len(names))
    try:
        yield
    finally:
        router.names, router.rows = before
