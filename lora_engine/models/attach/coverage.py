"""What `accelerate` did, module by module."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from lora_engine.models.families.modules import CausalLm
from lora_engine.models.families.structure import EXPERTS_OF_A_TOKEN


@dataclass(frozen=True)
class Coverage:
    """One place in the model: what runs there now, or why it was left as it was."""

    module: str
    operation: str
    replaced: bool
    detail: str  # the implementation if replaced, the reason if not


@dataclass
class CoverageReport:
    """The places that `accelerate` looked at. `str()` is a table, like places counted together.

    weights: the model's weights, without those of embeddings, which are only looked up. served:
        how many of them lora_engine's kernels compute with.
    flops, served_flops: floating-point operations of these weights in a token's forward pass: two
        for each weight; in experts only for the share that a token is routed to. Attention's
        products between tokens are not counted.
    """

    entries: list[Coverage] = field(default_factory=list)
    served: int = 0
    weights: int = 0
    served_flops: float = 0.0
    flops: float = 0.0

    def add(self, module: str, operation: str, replaced: bool, detail: str) -> None:
        """Notes one place."""
        self.entries.append(
            Coverage(module=module, operation=operation, replaced=replaced, detail=detail)
        )

    def count(self, weights: int, active: float, served: bool) -> None:
        """Counts weights; `active`: the share of them that one token is multiplied with."""
        self.weights += weights
        self.flops += 2 * weights * active
        if served:
            self.served += weights
            self.served_flops += 2 * weights * active

    @property
    def replaced(self) -> list[Coverage]:
        """The places that run on our kernels."""
        return [entry for entry in self.entries if entry.replaced]

    @property
    def left(self) -> list[Coverage]:
        """The places left as they were, with reasons."""
        return [entry for entry in self.entries if not entry.replaced]

    def __str__(self) -> str:
        rows = Counter(
            (_pattern(entry.module), entry.operation, entry.replaced, entry.detail)
            for entry in self.entries
        )
        if not rows:
            return "accelerate: no module was recognised"
        width = max(len(module) for module, *_ in rows)
        operation_width = max(len(operation) for _, operation, *_ in rows)
        shares = self.served / max(1, self.weights), self.served_flops / max(1.0, self.flops)
        total = (
            f"{shares[0]:.1%} of the weights that compute run on lora_engine's kernels, "
            f"{shares[1]:.1%} of their FLOPs"
        )
        table = "\n".join(
            f"{count:4d} × {module:<{width}}  {operation:<{operation_width}}  "
            f"{'→' if replaced else 'left:'} {detail}"
            for (module, operation, replaced, detail), count in rows.items()
        )
        return f"{table}\n{total}"


def active_share(model: CausalLm, name: str) -> float:
    """The share of a module's weights that one token is multiplied with: below 1 in experts."""
    path = name.split(".")
    if "experts" not in path:
        return 1.0
    config = model.config.get_text_config()
    counts = (getattr(config, key, None) for key in EXPERTS_OF_A_TOKEN)
    active = next((count for count in counts if isinstance(count, int)), None)
    if active is None:
        return 1.0
    experts = model.get_submodule(".".join(path[: path.index("experts") + 1]))
    if isinstance(experts, nn.ModuleList):
        return min(1.0, active / max(1, len(experts)))
    stacked = [p.shape[0] for p in experts.parameters() if p.dim() == 3]
    return min(1.0, active / stacked[0]) if stacked else 1.0


def _pattern(module: str) -> str:
    """`layers.3.mlp` as `layers.*.mlp`."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
