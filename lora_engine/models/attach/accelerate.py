"""`accelerate`: our kernels under a transformers model; `restore`: the model as it was."""

from collections.abc import Mapping
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine import backends
from lora_engine.errors import UserError
from lora_engine.models.attach import trl_head
from lora_engine.models.attach.attachment import Attachment, attach, attachment, detach
from lora_engine.models.attach.attention import AttentionForward
from lora_engine.models.attach.attention_interface import use_attention
from lora_engine.models.attach.backbone import BackboneForward
from lora_engine.models.attach.causal_lm import CausalLmForward, why_no_loss
from lora_engine.models.attach.coverage import CoverageReport, active_share
from lora_engine.models.attach.decoder_layer import DecoderLayerForward
from lora_engine.models.attach.embedding import EmbeddingForward, is_lora_embedding
from lora_engine.models.attach.embedding import why_not as why_no_embedding
from lora_engine.models.attach.head import peft_tuner, transformers_model
from lora_engine.models.attach.linear_group import ContiguousInput, LinearGroup, SingleLinear
from lora_engine.models.attach.mlp import MlpForward, activation_name, is_gated_mlp
from lora_engine.models.attach.norm import LayerNormForward, RmsNormForward, norm_forward
from lora_engine.models.attach.patches import Patches
from lora_engine.models.attach.saving import patch_ways_out
from lora_engine.models.attach.sequences import SequenceFinder
from lora_engine.models.attach.supervised_padding import LabelledForward
from lora_engine.models.families.structure import (
    ATTENTION_CLASSES,
    DECODER_CLASSES,
    NORM_OF_ATTENTION,
    NORM_OF_MLP,
)
from lora_engine.models.peft.lora_state import is_linear, is_lora
from lora_engine.models.proof.closeness import coarsest_dtype
from lora_engine.models.proof.probed_layers import kind_of
from lora_engine.models.proof.proof import own_results, same_logits, same_training

TYPICAL_ROWS = 4096
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
    an adapter, say). UserError for what is no model of transformers, nor one of PEFT's around it.
    """
    restore(model)
    inner = transformers_model(model)
    _check_is_of_transformers(inner)
    expected = _loss_and_gradients(model, verify) if verify is not None else None
    backends.keep_freed_memory(next(inner.parameters()).device)
    try:
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
    return report


def _replace_kept_forward(model: nn.Module, inner: nn.Module, patches: Patches) -> None:
    """Replaces the model's own forward where a wrapper around it has kept that.

    PEFT's AdaptionPromptModel copies the forward when it is made.
    """
    for around in (model, getattr(model, "base_model", None)):
        kept = vars(around).get("forward") if isinstance(around, nn.Module) else None
        if around is not inner and getattr(kept, "__self__", None) is inner:
            patches.set_attribute(around, "forward", inner.forward)


def _check_is_of_transformers(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"accelerate: {type(model).__name__} is no model of transformers; "
            "give it the transformers or PEFT model inside, before that is wrapped"
        )


def restore(model: nn.Module) -> None:
    """Takes back what `accelerate` did: forwards, attention, and weights in their own storage."""
    detach(transformers_model(model))


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate(model)` is in effect."""
    return attachment(transformers_model(model)) is not None


def _attach_proven(model: Any) -> CoverageReport:
    """Replaces what is recognised, as long as the model's results are its own: see proof.py."""
    own = own_results(model)
    left = dict.fromkeys(("attention", "loss"), own.error) if own.error else {}
    if not own.error and own.loss is None:
        left["loss"] = "the model takes no labels"
    while True:
        report = _Accelerator(model, attach(model), left).run()
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


class _Accelerator:
    """One walk over a model, replacing what is recognised.

    left: why attention, or the loss, are to be left to transformers.
    """

    def __init__(self, model: Any, attached: Attachment, left: Mapping[str, str]) -> None:
        self.model, self.attached = model, attached
        self.patches, self.router = attached.patches, attached.router
        self.left = left
        self.report = CoverageReport()
        self.finder = SequenceFinder()
        self.covered: set[nn.Module] = set()  # linears inside a replaced layer
        self.served: set[nn.Module] = set()  # modules whose parameters our kernels read
        self.agrees: dict[Any, bool] = {}  # kind of MLP -> whether ours computes what it does
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def run(self) -> CoverageReport:
        has_attention = self._attention_interface()
        tails: dict[nn.Module, int] = {}  # norm -> padding columns for the linears that read it
        for name, module in self.model.named_modules():
            if name and "forward" in vars(module):
                self.report.add(name, type(module).__name__, False, "someone replaced its forward")
            elif type(module).__name__ in ATTENTION_CLASSES and has_attention:
                self._attention(name, module, tails)
            elif is_gated_mlp(module):
                self._mlp(name, module, tails)
            elif type(module).__name__ in DECODER_CLASSES:
                last = module is self._last_layer()
                layer = DecoderLayerForward(module, self.router, last=last)
                self.patches.set_forward(module, layer)
                self.report.add(name, "blocks", True, "attention and MLP, each one function")
        for name, module in self.model.named_modules():
            if "forward" in vars(module):
                continue
            norm = norm_forward(module, tails.get(module, 0))
            if norm is not None:
                self._norm(name, module, norm)
            elif is_lora(module) and module not in self.covered:
                self._single_linear(name, module)
            elif is_lora_embedding(module):
                self._embedding(name, module)
        self._loss()
        self._backbone()
        self._account()
        return self.report

    def _account(self) -> None:
        """Counts weights, and notes each module with parameters that nothing was said of."""
        told = {part for module in self.covered for part in module.modules()}
        served = {part for module in self.served for part in module.modules()}
        for name, module in self.model.named_modules():
            own = list(module.parameters(recurse=False))
            if not own or isinstance(module, nn.Embedding):
                continue
            size, active = sum(p.numel() for p in own), active_share(self.model, name)
            self.report.count(size, active, module in served)
            if module not in told | served:
                kind = type(module).__name__
                self.report.add(name, kind, False, "not recognised: runs as transformers has it")

    def _last_layer(self) -> Any:
        layers = getattr(self.model.base_model, "layers", None)
        return layers[-1] if layers else None

    def _how(self, operation: str) -> str:
        return backends.explain(operation, self.device, self.dtype).reason

    def _attention_interface(self) -> bool:
        """Whether attention is ours from now on; without a kernel it stays transformers'."""
        choice = backends.explain("attention", self.device, self.dtype)
        problem = choice.reason if choice.impl == "reference" else self.left.get("attention")
        if problem is not None:
            self.report.add(type(self.model).__name__, "attention", False, problem)
            return False
        self.attached.own_attention = use_attention(self.model, self.patches)
        if self.attached.own_attention is None:
            self.report.add(
                type(self.model).__name__, "attention", False, "the class takes no interface"
            )
            return False
        return True

    def _group(self, name: str, modules: list[nn.Module]) -> LinearGroup:
        group = LinearGroup(modules, self.patches, self.router)
        self.covered.update(modules)
        if group.reason is None:
            self.served.update(modules)
        what = "lora_linear" if group.has_lora else "linear"
        how = f"{self._strategy(group)} product, {self._how('lora_linear')}"
        self.report.add(name, what, group.reason is None, group.reason or how)
        return group

    def _strategy(self, group: LinearGroup) -> str:
        """How the group's products are taken for a batch of TYPICAL_ROWS."""
        if group.lora is None:
            return ""
        return group.lora.forward_strategy(TYPICAL_ROWS)

    def _attention(self, name: str, module: Any, tails: dict[nn.Module, int]) -> None:
        qkv = self._group(f"{name}.qkv", [module.q_proj, module.k_proj, module.v_proj])
        output = self._group(f"{name}.o_proj", [module.o_proj])
        forward = AttentionForward(module, qkv, output, self.finder)
        self.patches.set_forward(module, forward)
        self.report.add(name, "attention + rope", True, self._how("attention"))
        self._note_tail(name, NORM_OF_ATTENTION, qkv, tails)

    def _mlp(self, name: str, module: Any, tails: dict[nn.Module, int]) -> None:
        linears = [module.gate_proj, module.up_proj, module.down_proj]
        activation = activation_name(module.act_fn)
        if activation is None or not all(map(is_linear, linears)):
            reason = "its activation is not SiLU or GELU, or its projections are no linear layers"
            self.report.add(name, "glu", False, reason)
            return
        gate_up = self._group(f"{name}.gate_up", linears[:2])
        down = self._group(f"{name}.down_proj", linears[2:])
        forward = MlpForward(module, gate_up, down, activation)
        kind = (activation, *kind_of(module))
        if kind not in self.agrees:
            self.agrees[kind] = _agrees(module, forward, linears[0].in_features)
        if not self.agrees[kind]:
            self.served.difference_update(linears)
            self.report.add(name, "glu", False, f"its forward is not down({activation}(gate) * up)")
            return
        self.patches.set_forward(module, forward)
        self.report.add(name, f"glu ({activation})", True, self._how("glu"))
        self._note_tail(name, NORM_OF_MLP, gate_up, tails)

    def _note_tail(
        self, name: str, norm: str, group: LinearGroup, tails: dict[nn.Module, int]
    ) -> None:
        """In known models the norm beside a layer feeds it; elsewhere the columns are unused."""
        parent = self.model.get_submodule(name.rpartition(".")[0])
        if hasattr(parent, norm):
            tails[getattr(parent, norm)] = group.tail

    def _norm(self, name: str, module: nn.Module, norm: RmsNormForward | LayerNormForward) -> None:
        self.patches.set_forward(module, norm)
        self.served.add(module)
        self.report.add(name, norm.operation, True, self._how(norm.operation))

    def _single_linear(self, name: str, module: nn.Module) -> None:
        group = self._group(name, [module])
        if group.lora is not None:
            self.patches.set_forward(module, SingleLinear(group))

    def _embedding(self, name: str, module: Any) -> None:
        problem = why_no_embedding(module)
        self.covered.add(module)
        if problem is None:
            self.served.add(module)
            self.patches.set_forward(module, EmbeddingForward(module, self.router))
        how = problem or "gathered rows, one product onto them"
        self.report.add(name, "lora_embedding", problem is None, how)

    def _backbone(self) -> None:
        """Packs padded batches where the layers allow it."""
        backbone = self.model.base_model
        has_layers = isinstance(getattr(backbone, "layers", None), nn.ModuleList)
        if has_layers and backbone is not self.model and "forward" not in vars(backbone):
            forward = BackboneForward(backbone, self.router, self.attached.own_attention)
            self.patches.set_forward(backbone, forward)

    def _loss(self) -> None:
        name = type(self.model).__name__
        problem = why_no_loss(self.model) or self.left.get("loss")
        if problem is None and trl_head.is_foreign(self.model):
            problem = "someone replaced the model's forward"
        head = self.model.get_output_embeddings()
        if head is not None:
            (self.served if problem is None else self.covered).add(head)
        if type(head) is nn.Linear and "forward" not in vars(head):
            self.patches.set_forward(head, ContiguousInput(head))
        if problem is None:
            if not trl_head.adopt(self.model, self.patches):
                self.patches.set_forward(self.model, CausalLmForward(self.model))
            setter = trl_head.ModeSetter(self.model, self.patches)
            self.patches.set_attribute(
                self.model, "train", update_wrapper(setter, setter.original, updated=())
            )
        else:
            self.patches.set_forward(self.model, LabelledForward(self.model))
        how = problem or self._how("linear_cross_entropy")
        self.report.add(name, "linear_cross_entropy", problem is None, how)


def _agrees(module: nn.Module, forward: Any, features: int) -> bool:
    """Whether `forward` computes what the module's own forward does, on two tokens."""
    weight = next(module.parameters())
    probe = torch.linspace(-1.0, 1.0, 2 * features).view(1, 2, features).to(weight)
    training = {part: part.training for part in module.modules()}
    module.eval()  # dropout would make them differ
    try:
        with torch.no_grad():
            expected, actual = module(probe).float(), forward(probe).float()
    finally:
        for part, before in training.items():
            part.training = before
    scale = expected.abs().max().clamp(min=1e-6)
    return bool((actual - expected).abs().max() <= 5e-2 * scale)


def _loss_and_gradients(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
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
