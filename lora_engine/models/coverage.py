"""What `accelerate` did, module by module."""

from collections import Counter
from dataclasses import dataclass, field


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

    served, weights: how many of the model's weights our kernels compute with, and how many compute
        at all: all but those of embeddings, which are looked up.
    """

    entries: list[Coverage] = field(default_factory=list)
    served: int = 0
    weights: int = 0

    def add(self, module: str, operation: str, replaced: bool, detail: str) -> None:
        """Notes one place."""
        self.entries.append(Coverage(module, operation, replaced, detail))

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
        share = self.served / max(1, self.weights)
        total = f"{share:.1%} of the weights that compute run on lora_engine's kernels"
        table = "\n".join(
            f"{count:4d} × {module:<{width}}  {operation:<{operation_width}}  "
            f"{'→' if replaced else 'left:'} {detail}"
            for (module, operation, replaced, detail), count in rows.items()
        )
        return f"{table}\n{total}"


def _pattern(module: str) -> str:
    """`layers.3.mlp` as `layers.*.mlp`."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
