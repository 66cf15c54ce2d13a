"""The walk over a model that puts our forwards where its modules are recognised."""

from collections.abc import Mapping
from functools import update_wrapper

import torch
from torch import nn

from lora_engine import backends
from lora_engine.models.attach import trl_head
from lora_engine.models.attach.attachment import Attachment
from lora_engine.models.attach.attention import AttentionForward, RotatedAttention
from lora_engine.models.attach.attention_interface import use_attention
from lora_engine.models.attach.backbone import BackboneForward
from lora_engine.models.attach.causal_lm import CausalLmForward, why_no_loss
from lora_engine.models.attach.coverage import CoverageReport, active_share
from lora_engine.models.attach.decoder_layer import DecoderLayerForward
from lora_engine.models.attach.embedding import EmbeddingForward, is_lora_embedding
from lora_engine.models.attach.embedding import why_not as why_no_embedding
from lora_engine.models.attach.linear_group import ContiguousInput, LinearGroup, SingleLinear
from lora_engine.models.attach.mlp import MlpForward, activation_name, is_gated_mlp
from lora_engine.models.attach.norm import LayerNormForward, RmsNormForward, norm_forward
from lora_engine.models.attach.saving import save_apart
from lora_engine.models.attach.sequences import SequenceFinder
from lora_engine.models.attach.supervised_padding import LabelledForward
from lora_engine.models.families.modules import (
    Attention,
    CausalLm,
    GatedMlp,
    LoraEmbedding,
)
from lora_engine.models.families.structure import (
    ATTENTION_CLASSES,
    DECODER_CLASSES,
    NORM_OF_ATTENTION,
    NORM_OF_MLP,
)
from lora_engine.models.peft.lora_state import base_layer, is_linear, is_lora
from lora_engine.models.proof.probed_layers import kind_of
from lora_engine.models.quantized.stored import decoded_dtype, inputs_unrounded, weight_count

TYPICAL_ROWS = 4096


class Walk:
    """One walk over a model; `run` replaces what is recognised and says what it did.

    left: why attention, or the loss, are to be left to transformers.
    """

    def __init__(self, model: CausalLm, attached: Attachment, left: Mapping[str, str]) -> None:
        self.model, self.attached = model, attached
        self.patches, self.router = attached.patches, attached.router
        self.left = left
        self.report = CoverageReport()
        self.finder = SequenceFinder()
        self.covered: set[nn.Module] = set()  # linears inside a replaced layer
        self.served: set[nn.Module] = set()  # modules whose parameters our kernels read
        # kind of MLP -> whether MlpForward computes the same
        self.agrees: dict[tuple[object, ...], bool] = {}
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def run(self) -> CoverageReport:
        serves_attention = self._serves_attention()
        padding_of: dict[
            nn.Module, int
        ] = {}  # norm -> padding columns for the linears that read it
        for name, module in self.model.named_modules():
            if name and "forward" in vars(module):
                self.report.add(name, type(module).__name__, False, "someone replaced its forward")
            elif type(module).__name__ in ATTENTION_CLASSES and serves_attention:
                self._attention(name, module, padding_of)
            elif is_gated_mlp(module):
                self._mlp(name, module, padding_of)
            elif type(module).__name__ in DECODER_CLASSES:
                last = module is self._last_layer()
                layer = DecoderLayerForward(module, self.router, last=last)
                self.patches.set_forward(module, layer)
                self.report.add(name, "blocks", True, "attention and MLP, each one function")
        for name, module in self.model.named_modules():
            if "forward" in vars(module):
                continue
            norm = norm_forward(module, padding_of.get(module, 0))
            if norm is not None:
                self._norm(name, module, norm)
            elif is_lora(module) and module not in self.covered:
                self._single_linear(name, module)
            elif is_lora_embedding(module):
                self._embedding(name, module)
        self._loss()
        self._backbone()
        self._tied_embeddings()
        self._account()
        return self.report

    def _account(self) -> None:
        """Counts weights, and notes each module with parameters that nothing was said of."""
        served = {part for module in self.served for part in module.modules()}
        told = served.union(part for module in self.covered for part in module.modules())
        for name, module in self.model.named_modules():
            own = [p for p in module._parameters.values() if p is not None]
            if not own or isinstance(module, nn.Embedding):
                continue
            size, active = weight_count(module), active_share(self.model, name)
            self.report.count(size, active, module in served)
            if module not in told:
                kind = type(module).__name__
                self.report.add(name, kind, False, "not recognised: runs as transformers has it")

    def _last_layer(self) -> nn.Module | None:
        layers = getattr(self.model.base_model, "layers", None)
        return layers[-1] if layers else None

    def _how(self, operation: str, format: str = "dense") -> str:
        return backends.explain(operation, self.device, self.dtype, format=format).reason

    def _serves_attention(self) -> bool:
        """Whether known attention layers get a forward of ours.

        Attention is ours from now on if it can be (`own_attention`); without a kernel rotation is.
        """
        choice = backends.explain("attention", self.device, self.dtype)
        has_kernel, left = choice.impl != "reference", self.left.get("attention")
        problem = left if has_kernel else choice.reason
        if problem is None:
            self.attached.own_attention = use_attention(self.model, self.patches)
            if self.attached.own_attention is not None:
                return True
            problem = "the class takes no interface"
        self.report.add(type(self.model).__name__, "attention", False, problem)
        if has_kernel or left is not None:
            return False
        return backends.explain("rope", self.device, self.dtype).impl != "reference"

    def _group(self, name: str, modules: list[nn.Module]) -> LinearGroup:
        group = LinearGroup(modules, self.patches, self.router, self.dtype)
        self.covered.update(modules)
        if group.reason is None:
            self.served.update(modules)
        what = "lora_linear" if group.has_lora else "linear"
        self.report.add(name, what, group.reason is None, group.reason or self._products(group))
        return group

    def _products(self, group: LinearGroup) -> str:
        """How the group's products are taken for a batch of TYPICAL_ROWS."""
        if group.lora is None:
            return ""
        strategy = group.lora.forward_strategy(TYPICAL_ROWS)
        return f"{strategy} product, {self._how('lora_linear', group.lora.base.format)}"

    def _attention(self, name: str, module: Attention, padding_of: dict[nn.Module, int]) -> None:
        qkv = self._group(f"{name}.qkv", [module.q_proj, module.k_proj, module.v_proj])
        output = self._group(f"{name}.o_proj", [module.o_proj])
        if self.attached.own_attention is None:
            self.patches.set_forward(module, RotatedAttention(module, qkv, output))
            self.report.add(name, "rope", True, self._how("rope"))
        else:
            forward = AttentionForward(module, qkv, output, self.finder)
            self.patches.set_forward(module, forward)
            self.report.add(name, "attention + rope", True, self._how("attention"))
        self._note_padding(name, NORM_OF_ATTENTION, qkv, padding_of)

    def _mlp(self, name: str, module: GatedMlp, padding_of: dict[nn.Module, int]) -> None:
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
            self.agrees[kind] = _agrees(module, forward, base_layer(linears[0]), self.dtype)
        if not self.agrees[kind]:
            self.served.difference_update(linears)
            self.report.add(name, "glu", False, f"its forward is not down({activation}(gate) * up)")
            return
        self.patches.set_forward(module, forward)
        self.report.add(name, f"glu ({activation})", True, self._how("glu"))
        self._note_padding(name, NORM_OF_MLP, gate_up, padding_of)

    def _note_padding(
        self, name: str, norm: str, group: LinearGroup, padding_of: dict[nn.Module, int]
    ) -> None:
        """In known models the norm beside a layer feeds it; elsewhere the columns are unused."""
        parent = self.model.get_submodule(name.rpartition(".")[0])
        if hasattr(parent, norm):
            padding_of[getattr(parent, norm)] = group.padding_columns

    def _norm(self, name: str, module: nn.Module, norm: RmsNormForward | LayerNormForward) -> None:
        self.patches.set_forward(module, norm)
        self.served.add(module)
        self.report.add(name, norm.operation, True, self._how(norm.operation))

    def _single_linear(self, name: str, module: nn.Module) -> None:
        group = self._group(name, [module])
        if group.lora is not None:
            self.patches.set_forward(module, SingleLinear(group))

    def _embedding(self, name: str, module: LoraEmbedding) -> None:
        problem = why_no_embedding(module)
        self.covered.add(module)
        if problem is None:
            self.served.add(module)
            self.patches.set_forward(module, EmbeddingForward(module, self.router))
        how = problem or "gathered rows, one product onto them"
        self.report.add(name, "lora_embedding", problem is None, how)

    def _tied_embeddings(self) -> None:
        """Embeddings whose weight moved into the buffer of a head that has an adapter."""
        embeddings = self.model.get_input_embeddings()
        if isinstance(embeddings, nn.Embedding) and self.patches.places(embeddings.weight):
            save_apart(embeddings, self.patches)

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


def _agrees(module: nn.Module, forward: MlpForward, first: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether `forward` computes what the module's own does, on two tokens that `first` takes."""
    features = first.in_features
    probe = torch.linspace(-1.0, 1.0, 2 * features).view(1, 2, features)
    probe = probe.to(first.weight.device, decoded_dtype(first, dtype))
    training = {part: part.training for part in module.modules()}
    module.eval()  # dropout would make them differ
    try:
        with torch.no_grad():
            with inputs_unrounded(module):
                expected = module(probe).float()
            actual = forward(probe).float()
    finally:
        for part, before in training.items():
            part.training = before
    scale = expected.abs().max().clamp(min=1e-6)
    return bool((actual - expected).abs().max() <= 5e-2 * scale)
