"""Whether merged weights compute what the adapter computed, on rows of held-out tokens.

The base with the adapters on, through PEFT, and the merged folder, through transformers alone (or,
where it is packed, as `load_model` reads it), both in float32 arithmetic: what differs is the
rounding of the merged weights.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.errors import UserError
from lora_engine.export.adapter import Adapter
from lora_engine.export.loading import load_adapter
from lora_engine.models.load.transformers_files import (
    check_weights,
    quiet_transformers,
    readable_folder,
)

# Distributions compared at most, and bytes of them that are kept.
POSITIONS = 1024
_KEPT_BYTES = 1 << 28


@dataclass(frozen=True)
class Tolerance:
    """kl: mean KL divergence in nats. top1: share of positions with the same likeliest token.
    loss: difference of the mean loss in nats. effect: `kl` as a part of the adapter's own."""

    kl: float
    top1: float
    loss: float
    effect: float = 0.25


# What the rounding of the weights costs is decided by their dtype.
TOLERANCES = {
    "float32": Tolerance(1e-6, 0.999, 1e-4),
    "float16": Tolerance(1e-4, 0.99, 1e-3),
    "bfloat16": Tolerance(5e-3, 0.97, 2e-2),
}
# Of packed weights, by the bits of a code. 4 to 5 bits cost a small model the most.
_PACKED = {8: Tolerance(3e-2, 0.9, 5e-2), 4: Tolerance(0.3, 0.7, 0.3)}
# Below this the adapter changes nothing that float32 arithmetic could tell from rounding.
_NO_EFFECT = 1e-9


def packed_tolerance(bits: float) -> Tolerance:
    """What a format of so many bits a parameter, with its scales, may cost."""
    return _PACKED[8 if bits >= 8 else 4]


@dataclass(frozen=True)
class Comparison:
    """The merged weights beside the base with adapters on, over `positions` next-token
    distributions. kl: mean of KL(on || merged); kl_without: of KL(on || base without adapters).
    losses: the mean of −log p of the tokens that follow, in nats."""

    positions: int
    kl: float
    kl_max: float
    kl_without: float
    top1: float
    loss_adapter: float
    loss_merged: float

    def problem(self, tolerance: Tolerance) -> str | None:
        """What is out of tolerance, None if nothing is."""
        difference = abs(self.loss_adapter - self.loss_merged)
        found = []
        if not self.kl <= tolerance.kl:
            found.append(f"KL {self.kl:.2g} nats, at most {tolerance.kl:.2g}")
        if not self.top1 >= tolerance.top1:
            found.append(f"the likeliest token agrees at {self.top1:.1%}, {tolerance.top1:.1%}")
        if not difference <= tolerance.loss:
            found.append(f"the loss differs by {difference:.2g}, at most {tolerance.loss:.2g}")
        if self.kl_without > _NO_EFFECT and not self.kl <= tolerance.effect * self.kl_without:
            share = self.kl / self.kl_without
            found.append(f"{share:.0%} of what the adapter changes is lost")
        return "; ".join(found) or None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    base: Path,
    adapters: Sequence[tuple[Adapter, float]],
    merged: Path,
    rows: Sequence[Sequence[int]],
    device: str | torch.device = "cpu",
    load: Callable[[Path], Any] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> Comparison:
    """Both models' next-token distributions over the first positions of `rows` of token ids.

    load: of the merged model, `load_plain` if None. prepare: what is done to the model with its
    adapters before it computes.
    At most POSITIONS, and so many as a quarter of a gigabyte holds. Raises UserError for rows that
    are no tokens of the model and for a merged folder that transformers cannot load whole.
    """
    model = load_plain(base, device)
    chosen = _chosen(rows, model.get_input_embeddings().weight.shape[0])
    off = _logits(model, chosen)
    model = with_adapters(model, adapters)
    if prepare is not None:
        prepare(model)
    on = _logits(model, chosen)
    del model
    gc.collect()
    after = _logits((load or load_plain)(merged).to(device), chosen)
    following = torch.cat([torch.tensor(row[1:]) for row in chosen])
    kl = _kl(on, after)
    losses = [torch.nn.functional.cross_entropy(logits, following).item() for logits in (on, after)]
    return Comparison(
        positions=len(following),
        kl=kl.mean().item(),
        kl_max=kl.max().item(),
        kl_without=_kl(on, off).mean().item(),
        top1=(on.argmax(1) == after.argmax(1)).double().mean().item(),
        loss_adapter=losses[0],
        loss_merged=losses[1],
    )


def load_plain(folder: Path, device: str | torch.device = "cpu") -> Any:
    """The model in `folder` as transformers alone loads it, in float32 and evaluation mode."""
    from transformers import AutoModelForCausalLM

    with readable_folder(str(folder), str(folder)), quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one line
        )
    check_weights(str(folder), model, info)
    return model.to(device).eval()


def with_adapters(model: Any, adapters: Sequence[tuple[Adapter, float]]) -> Any:
    """`model` in a PeftModel with `adapters` active at once, each scaled by its weight.

    Raises UserError for an adapter that PEFT cannot load on it.
    """
    wrapped = model
    for adapter, _ in adapters:
        wrapped = load_adapter(wrapped, adapter.folder, adapter.name)
    if len(adapters) > 1:
        wrapped.base_model.set_adapter([adapter.name for adapter, _ in adapters])
    for adapter, weight in adapters:
        if weight == 1:
            continue
        for module in wrapped.modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and adapter.name in scaling:
                scaling[adapter.name] *= weight
    return wrapped.eval()


def _chosen(rows: Sequence[Sequence[int]], vocabulary: int) -> list[list[int]]:
    """The rows' first tokens, as many as are compared; of two tokens or more each."""
    left = min(POSITIONS, max(1, _KEPT_BYTES // (3 * 4 * vocabulary)))
    chosen = []
    for row in rows:
        ids = list(row)[: left + 1]
        if len(ids) < 2:
            continue
        if max(ids) >= vocabulary:
            raise UserError(
                f"the held-out rows hold token {max(ids)}, the model has {vocabulary}; give the "
                "base that the adapter was trained on with --base"
            )
        chosen.append(ids)
        left -= len(ids) - 1
        if left < 1:
            break
    if not chosen:
        raise UserError("there are no held-out rows of two tokens to compare on; give --data")
    return chosen


def _logits(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """[positions, vocabulary] float32, on the CPU."""
    kept = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row[:-1]], device=model.device)
            logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
            kept.append(logits.float().cpu())
    return torch.cat(kept)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """[positions] float64: KL(p || q) of two models' logits [positions, vocabulary]."""
    parts = []
    for ours, theirs in zip(p.split(64), q.split(64), strict=True):
        a, b = (logits.double().log_softmax(1) for logits in (ours, theirs))
        parts.append((a.exp() * (a - b)).sum(1).clamp_min(0))
    return torch.cat(parts)
