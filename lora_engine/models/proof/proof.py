"""Whether an accelerated model computes what it computed before, tried on small batches.

Structure shows what a model probably does; its own results on a padded, a whole and a packed batch
show whether that is so: layer by layer, its logits, its loss and gradients. What differs is left to
transformers.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_engine.models.attach.attachment import detach
from lora_engine.models.attach.attention_function import proving
from lora_engine.models.attach.causal_lm import CausalLmForward
from lora_engine.models.attach.head import Head, output_head, why_no_head
from lora_engine.models.families.modules import CausalLm
from lora_engine.models.families.structure import ATTENTION_SPANS
from lora_engine.models.proof.closeness import HALF, TOLERANCE, distance, rms, typical
from lora_engine.models.proof.probed_layers import ProbedLayers

# Relative tolerances: of the loss, and of gradients, in which the rounding of all layers adds up.
_LOSS = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}
_GRADIENT = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 0.2}
EMBEDDINGS = "the embeddings' output"
_MOST_ELEMENTS = 2**20  # of a parameter whose gradient is compared
_MOST_EXACT = 2**25  # parameters of a model that is run in float64
LENGTH = 9
LONGEST = 72  # windows and chunks up to about so long are tried; longer ones would take too long


@dataclass
class Results:
    """A model's results for the probe batches, or the error that it raised.

    logits: of the rows that are no padding, a tensor a batch; hidden states where the model has no
        logits of tokens.
    beyond_head: whether the logits are other than the head's product with the last hidden states.
    """

    layers: ProbedLayers
    logits: list[Tensor] = field(default_factory=list)
    beyond_head: bool = False
    loss: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    error: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.layers.dtype


def own_results(model: CausalLm) -> Results:
    """Results with transformers' own forwards: logits, and loss and gradients of labels."""
    own = Results(ProbedLayers(model))
    if any(p.device.type == "meta" for p in model.parameters()):
        own.error = "its weights have no values yet"
        return own
    try:
        with measuring(model):
            for batch in _batches(model):
                with own.layers.recording(exact=not own.logits), _last_hidden(model) as last:
                    own.logits.append(_logits(model, batch))
                if len(own.logits) == 1 and last and why_no_head(model) is None:
                    hidden = _without_padding(last[0], batch)
                    own.beyond_head = not _are_logits(own, hidden, output_head(model))
            with own.layers.recording(last=True):
                own.loss, own.gradients = _train(model)
    except Exception as error:  # whatever a model needs beyond token ids
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        own.error = f"it cannot be tried on token ids ({reason})"
    return own


def same_logits(model: CausalLm, own: Results) -> str | None:
    """Why the accelerated model's layers or logits are not its own; None if they are."""
    if own.error:
        return own.error
    own.layers.rewind()
    try:
        with measuring(model), proving():
            for batch, expected in zip(_batches(model), own.logits, strict=True):
                with own.layers.replaying(batch.get("attention_mask")):
                    logits = _logits(model, batch)
                if own.layers.problem is not None:
                    return own.layers.problem
                worst = distance(logits, expected)
                if worst > TOLERANCE.get(own.dtype, 0.0):
                    return f"a try gives other logits than the model's own, by {worst:.1e}"
    except Exception as error:
        return f"a try raises {type(error).__name__}: {error}".partition("\n")[0]
    return None


def same_training(model: CausalLm, own: Results) -> str | None:
    """Why the accelerated model's loss or gradients are not its own; None if they are.

    Called after `same_logits`, whose batches come before.
    """
    if own.error:
        return own.error
    if own.loss is None:
        return None
    if own.beyond_head and isinstance(vars(model).get("forward"), CausalLmForward):
        return "the model's logits are more than its head's product with the hidden states"
    try:
        with measuring(model), own.layers.replaying(last=True):
            model.training = (
                True  # the model alone is in training: its parts stay in eval mode, without dropout
            )
            loss, gradients = _train(model)
    except Exception as error:
        return f"a try raises {type(error).__name__}: {error}".partition("\n")[0]
    assert loss is not None
    if distance(loss, own.loss) > _LOSS.get(own.dtype, 0.0):
        return f"a try gives a loss of {loss.item():.5g}, the model's own is {own.loss.item():.5g}"
    other = _other_gradient(gradients, own.gradients, own.dtype)
    if other is not None and (exact := _exact_gradients(model, own.dtype)) is not None:
        other = _other_gradient(gradients, exact, own.dtype)
    if other is None:
        return None
    return f"a try gives another gradient of {other} than the model's own"


def _other_gradient(
    ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> str | None:
    """The name of the first gradient that rounding does not explain; None if there is none."""
    largest = max(map(rms, expected.values()), default=0.0)
    for name, theirs in expected.items():
        if dtype in HALF:
            if (
                name != EMBEDDINGS
            ):  # rounding may route tokens to other experts, and so change these altogether
                continue
            tokens = (ours[name] - theirs).flatten(0, -2), theirs.flatten(0, -2)
            off, allowed = (typical(x.float()) for x in tokens)
        else:
            off, allowed = rms(ours[name] - theirs), max(rms(theirs), 0.1 * largest)
        if not off <= allowed * _GRADIENT.get(dtype, 0.0):
            return name
    return None


def _exact_gradients(model: CausalLm, dtype: torch.dtype) -> Mapping[str, Tensor] | None:
    """The gradients of the model's own forwards in float64; None where it has no such.

    Where an activation has a kink, rounding alone decides float32's gradient beside it. The larger
    the model, the less one value means, and the dearer a copy.
    """
    if dtype != torch.float32 or sum(p.numel() for p in model.parameters()) > _MOST_EXACT:
        return None
    try:
        exact = copy.deepcopy(model)
        detach(exact)
        exact.double()
        with measuring(exact):
            return _train(exact)[1]
    except Exception:  # parts that compute in float32 alone, or hold what cannot be copied
        return None


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Within: no dropout and no autograd; the CPU's random generator is as before afterwards."""
    training = [vars(part) for part in model.modules() if part.training]
    for part in training:  # not by nn.Module's own assignment, which looks for parameters
        part["training"] = False
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        model.training = False
        for part in training:
            part["training"] = True


def _logits(model: CausalLm, batch: dict[str, Tensor]) -> Tensor:
    """The logits of the rows that are no padding."""
    return _without_padding(_of_each_token(model, batch), batch)


def _of_each_token(model: CausalLm, batch: dict[str, Tensor]) -> Tensor:
    """Logits [B, L, V], or hidden states [B, L, H] where the model's logits are not of tokens."""
    output = model(**batch, use_cache=False)
    if "logits" in output and output["logits"].shape[:-1] == batch["input_ids"].shape:
        return output["logits"]
    if "last_hidden_state" not in output:  # a classifier of whole sequences
        output = model.base_model(**batch, use_cache=False)
    return output["last_hidden_state"]


def _without_padding(rows: Tensor, batch: dict[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return rows if mask is None else rows[mask.bool()]


@contextmanager
def _last_hidden(model: CausalLm) -> Iterator[list[Tensor]]:
    """The last hidden states of the backbone's calls within."""
    outputs: list[Tensor] = []
    backbone = model.base_model
    if backbone is model:
        yield outputs
        return
    watch = backbone.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        yield outputs
    finally:
        watch.remove()


def _are_logits(own: Results, hidden: Tensor, head: Head) -> bool:
    """Whether the first batch's logits are the head's product with the last hidden states."""
    if hidden.shape[-1] != head.weight.shape[1]:
        return False
    return distance(head.logits(hidden), own.logits[0]) <= TOLERANCE.get(own.dtype, 0.0)


def _train(model: CausalLm) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The loss of labels, and its gradients: the embeddings' output's and small parameters'."""
    if model.get_output_embeddings() is None:  # its labels, if it takes any, are no tokens
        return None, {}
    batch = _padded(model)
    padding = batch["attention_mask"] == 0
    padding[:, 1:] |= padding[:, :-1].clone()  # nor what a padding token would predict
    labels = batch["input_ids"].masked_fill(padding, -100)
    wanted: dict[str, Tensor] = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and p.numel() <= _MOST_ELEMENTS
    }

    def differentiable(module: nn.Module, args: object, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        wanted.setdefault(EMBEDDINGS, output)
        return output.clone()  # models may change it in place

    watch = model.get_input_embeddings().register_forward_hook(differentiable)
    try:
        with torch.enable_grad():
            output = model(**batch, labels=labels, use_cache=False)
    except TypeError:  # a model without a loss
        return None, {}
    finally:
        watch.remove()
    loss: Tensor | None = getattr(output, "loss", None)
    if loss is None:
        return None, {}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    named = zip(wanted.items(), grads, strict=True)
    return loss.detach(), {
        name: torch.zeros_like(x) if grad is None else grad for (name, x), grad in named
    }


def _length(model: CausalLm) -> int:
    config = model.config.get_text_config()
    spans = [getattr(config, name, None) for name in ATTENTION_SPANS]
    short = [span for span in spans if isinstance(span, int) and LENGTH <= span + 3 <= LONGEST]
    return max([LENGTH, *(span + 3 for span in short)])


def _batches(model: CausalLm) -> list[dict[str, Tensor]]:
    """Padded, whole and, where the model takes positions, packed."""
    whole = {"input_ids": probe_tokens(model, 1, _length(model))}
    batches = [_padded(model), whole]
    if "position_ids" in inspect.signature(model.forward).parameters:
        ids = whole["input_ids"]
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        first = ids.shape[1] // 2
        positions = torch.where(places < first, places, places - first)
        batches.append({"input_ids": ids, "position_ids": positions})
    return batches


def probe_tokens(model: CausalLm, rows: int, length: int) -> Tensor:
    """[rows, length] int64: different ordinary tokens."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    words = min(embeddings.shape[0], getattr(model.config.get_text_config(), "vocab_size", 2**62))
    ids = 3 + torch.arange(rows * length) * 7 % max(1, words - 3)
    return ids.view(rows, length).to(embeddings.device)


def _padded(model: CausalLm) -> dict[str, Tensor]:
    """A whole row, one with padding on its left, one with padding on its right."""
    ids = probe_tokens(model, 3, _length(model))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}
