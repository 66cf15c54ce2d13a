"""`accelerate`: our kernels under a transformers model; `restore`: the model as it was."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_engine import backends
from lora_engine.errors import UserError
from lora_engine.models.attach.attachment import attach, attachment, detach
from lora_engine.models.attach.coverage import CoverageReport
from lora_engine.models.attach.head import peft_tuner, transformers_model
from lora_engine.models.attach.patches import Patches
from lora_engine.models.attach.saving import patch_ways_out
from lora_engine.models.attach.walk import Walk
from lora_engine.models.families.modules import CausalLm
from lora_engine.models.proof.closeness import coarsest_dtype
from lora_engine.models.proof.proof import own_results, same_logits, same_training
from lora_engine.models.quantized.stored import inputs_unrounded, not_packed_anew

VERIFY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}


@torch.inference_mode(
    False
)  # buffers made here are written in training, which inference tensors forbid
def accelerate(
    model: nn.Module,
    *,
    strict: bool = False,
    verify: dict[str, Tensor] | None = None,
) -> CoverageReport:
    """Puts our kernels under a transformers causal language model, plain or with PEFT LoRA.

    Behaviour is replaced on the model's own module instances; parameters, names and files stay as
    they are, and `restore(model)` takes it all back. Frozen weights of linears that share an input
    move into one buffer, which their parameters then view. In training, calling the model with
    `labels` computes the loss without logits, which are made when the result's `logits` are read.

    The model is tried on small batches before and after: where its attention or its loss would not
    be its own, they are left to transformers, and the report says so.

    On a CPU the process's allocator is told to keep freed memory for reuse (glibc; about 4 % of a
    step where batches are of equal size), which `restore` does not take back.

    `verify`, a batch as the model takes it with labels, runs loss and gradients both ways and
    raises ValueError outside the VERIFY_TOLERANCE of the coarsest weights. `strict` raises
    UserError where anything was left. Accelerating an accelerated model does it anew (after adding
    an adapter, say). UserError for what is no model of transformers, nor one of PEFT's around it,
    and for parameters that were made under torch.inference_mode, or are sharded over processes.
    """
    inner = transformers_model(model)
    _check_is_of_transformers(inner)
    _check_parameters(inner)
    restore(model)
    expected = _loss_and_gradients(model, verify) if verify is not None else None
    device = next(inner.parameters()).device
    backends.keep_freed_memory(device, _bytes_to_place(inner))
    try:
        with not_packed_anew(inner), _outside_modes(inner):
            report = _attach_proven(inner)
        attached = attachment(inner)
        assert attached is not None
        patch_ways_out(inner, peft_tuner(model), attached.patches)
        _replace_kept_forward(model, inner, attached.patches)
        if strict and report.left:
            raise UserError(f"accelerate(strict=True) left parts of the model:\n{report}")
        if verify is not None and expected is not None:
            _compare(expected, _loss_and_gradients(model, verify), coarsest_dtype(model))
    except BaseException:
        restore(model)
        raise
    backends.keep_freed_memory(device)
    return report


@contextmanager
def _outside_modes(model: nn.Module) -> Iterator[None]:
    """Within, the caller's modes do not count: autocast, and meta as the default device."""
    meta = torch.get_default_device().type == "meta"
    device = next(model.parameters()).device if meta else nullcontext()
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), device:
        yield


def _replace_kept_forward(model: nn.Module, inner: nn.Module, patches: Patches) -> None:
    """Replaces copies of the model's own forward that a wrapper around it holds.

    PEFT's AdaptionPromptModel copies the forward when it is constructed.
    """
    for around in (model, getattr(model, "base_model", None)):
        kept = vars(around).get("forward") if isinstance(around, nn.Module) else None
        if around is not inner and getattr(kept, "__self__", None) is inner:
            patches.set_attribute(around, "forward", inner.forward)


def _check_is_of_transformers(model: object) -> None:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return
    mend = "the transformers or PEFT model inside, before that is wrapped"
    if not isinstance(model, nn.Module):
        mend = "trainer.model" if hasattr(model, "model") else "a model, not its name or parts"
    raise UserError(f"accelerate: {type(model).__name__} is no model of transformers; give {mend}")


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UserError(
                f"accelerate: {name} was made under torch.inference_mode, and PyTorch trains no "
                "such parameters; build or load the model, and its adapters, outside of it"
            )
        if is_traceable_wrapper_subclass(parameter):
            raise UserError(
                f"accelerate: {name} is a {type(parameter).__name__}, which kernels cannot read; "
                "give a model of plain parameters, not sharded over processes"
            )


def _bytes_to_place(model: nn.Module) -> int:
    """Of the weights that move beside their factors, at most."""
    weights = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    return sum(weight.nbytes for weight in weights)


def restore(model: nn.Module) -> None:
    """Takes back what `accelerate` did: forwards, attention, and weights in their own storage.

    Leaves a model that is not accelerated as it is. UserError for what is no model.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"restore: {type(model).__name__} is no model; give the accelerated one")
    detach(transformers_model(model))


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate(model)` is in effect."""
    return attachment(transformers_model(model)) is not None


def _attach_proven(model: CausalLm) -> CoverageReport:
    """Replaces what is recognised, as long as the model's results are its own: see proof.py."""
    with inputs_unrounded(model):
        own = own_results(model)
    left = dict.fromkeys(("attention", "loss"), own.error) if own.error else {}
    if not own.error and own.loss is None:
        left["loss"] = "the model takes no labels"
    while True:
        report = Walk(model, attach(model), left).run()
        if own.error:
            return report
        parts, problem = ["attention"], same_logits(model, own)
        if problem is None:
            parts, problem = ["loss", "attention"], same_training(model, own)
        if problem is None:
            return report
        part = next((part for part in parts if part not in left), None)
        detach(model)
        if part is None:  # with transformers' attention and loss it still differs
            attach(model)
            report = CoverageReport()
            report.add(type(model).__name__, "everything", False, problem)
            return report
        left[part] = problem


def _loss_and_gradients(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    was_training = model.training
    model.train()
    try:
        loss = model(**batch).loss
    finally:
        model.train(was_training)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    named = zip(parameters, grads, strict=True)
    return loss.item(), {name: grad for name, grad in named if grad is not None}


def _compare(
    expected: tuple[float, dict[str, Tensor]],
    actual: tuple[float, dict[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    (loss, grads), (our_loss, our_grads) = expected, actual
    tolerance = VERIFY_TOLERANCE.get(dtype, 5e-2)
    if abs(our_loss - loss) > tolerance * max(1.0, abs(loss)):
        raise ValueError(f"accelerate(verify=…): loss {our_loss:.6g}, the model's own {loss:.6g}")
    if grads.keys() != our_grads.keys():
        raise ValueError("accelerate(verify=…): gradients reach other parameters than before")
    scale = max(grad.abs().max().item() for grad in grads.values())
    for name, grad in grads.items():
        worst = (our_grads[name] - grad).abs().max().item()
        if worst > tolerance * max(scale, 1e-12):
            raise ValueError(
                f"accelerate(verify=…): the gradient of {name} is off by {worst:.3g}, "
                f"largest gradient {scale:.3g}"
            )
