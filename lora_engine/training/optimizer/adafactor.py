"""Adafactor over flat parameters: of a matrix's second moments a row and a column."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.flat import FlatEntry, FlatParameters
from lora_engine.training.optimizer.optimizer import FlatOptimizer

DECAY = -0.8  # β2 of step t is 1 − t^DECAY
EPS = 1e-30  # added to squared gradients
LARGEST_RMS = 1.0  # of an update before it is multiplied by the learning rate


class FlatAdafactor(FlatOptimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) with the schedule's learning rate, without
    a first moment.

    Of a matrix [N, K] with gradient G, β = 1 − t^−0.8 at step t:

        r ← β r + (1 − β) mean over columns of (G² + ε)            [N]
        c ← β c + (1 − β) mean over rows of (G² + ε)               [K]
        U = G / sqrt(r cᵀ / mean r)
        W ← W (1 − lr · weight_decay) − lr · U / max(1, rms U)

    Tensors of more dimensions are matrices over their last two. Vectors have whole second moments.
    row, column, whole: these states of all parameters, by name.
    """

    by_entry = True

    def __init__(self, flat: FlatParameters, config: TrainConfig) -> None:
        super().__init__(flat, config)
        matrices = [entry for entry in flat.entries if len(entry.shape) > 1]
        vectors = [entry for entry in flat.entries if len(entry.shape) <= 1]
        self.row = {e.name: self._zeros(e.shape[:-1]) for e in matrices}
        self.column = {e.name: self._zeros((*e.shape[:-2], e.shape[-1])) for e in matrices}
        self.whole = {e.name: self._zeros(e.shape) for e in vectors}

    def stored(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """As many tensors per parameter as it has."""
        stems = {
            "exp_avg_sq_row": self.row,
            "exp_avg_sq_column": self.column,
            "exp_avg_sq": self.whole,
        }
        return {stem: named for stem, named in stems.items() if named}

    def buffers(self) -> list[torch.Tensor]:
        return [x for named in self.stored().values() for x in named.values()]

    def _update_entry(
        self,
        entry: FlatEntry,
        grads: torch.Tensor,  # [n] float32
        learning_rate: float,
        norm: torch.Tensor | None,
    ) -> None:
        at_start = dataclasses.replace(entry, offset=0)
        w, g = at_start.view(self.flat.data[entry.part]), at_start.view(grads)
        new, clipping = self.updates**DECAY, self._clipping(norm)
        found: list[_Scaled] = []
        if entry.name in self.whole:
            moments = self.whole[entry.name]
            moments.lerp_((g * clipping).square_().add_(EPS), new)
            found.append(_Scaled(params=w, grads=g, columns=moments.rsqrt(), rows=None))
        else:
            states = _matrices(self.row[entry.name], 1), _matrices(self.column[entry.name], 1)
            for of_w, of_g, row, column in zip(_matrices(w), _matrices(g), *states, strict=True):
                self._factor(of_g, clipping, row, column, new)
                rows, columns = (row / row.mean()).rsqrt_()[:, None], column.rsqrt()
                parts = self._rows(of_g)
                found += [
                    _Scaled(params=of_w[part], grads=of_g[part], columns=columns, rows=rows[part])
                    for part in parts
                ]
        total = torch.stack([each.update(clipping).square_().sum() for each in found]).sum()
        rms = (total / max(1, entry.numel)).sqrt_()
        factor = learning_rate / (rms / LARGEST_RMS).clamp_(min=1)
        for each in found:
            with self._writing(each.params, int(each.params.storage_offset())) as params:
                params.mul_(1 - learning_rate * self.config.weight_decay)
                params.sub_(each.update(clipping).mul_(factor))

    def _factor(
        self,
        g: torch.Tensor,  # [N, K]
        clipping: torch.Tensor | float,
        row: torch.Tensor,  # [N]
        column: torch.Tensor,  # [K]
        new: float,
    ) -> None:
        """Adds a gradient's squares to its row and column, with the weight `new`."""
        means, sums = torch.empty_like(row), torch.zeros_like(column)
        for part in self._rows(g):
            squares = (g[part] * clipping).square_().add_(EPS)
            means[part] = squares.mean(1)
            sums += squares.sum(0)
        row.lerp_(means, new)
        column.lerp_(sums / g.shape[0], new)

    def _rows(self, matrix: torch.Tensor) -> Iterator[slice]:
        """Parts of its rows whose elements are about a chunk."""
        count = max(1, self.chunk // max(1, matrix.shape[1]))
        for start in range(0, matrix.shape[0], count):
            yield slice(start, start + count)


class _Scaled(NamedTuple):
    """Some rows of a parameter, their gradient, and what scales it: two factors."""

    params: torch.Tensor  # [n, K], or [n]
    grads: torch.Tensor
    columns: torch.Tensor  # [K], or [n]
    rows: torch.Tensor | None  # [n, 1]

    def update(self, clipping: torch.Tensor | float) -> torch.Tensor:
        """U of these rows, in memory of its own."""
        u = self.grads * clipping
        u.mul_(self.columns)
        return u if self.rows is None else u.mul_(self.rows)


def _matrices(x: torch.Tensor, dims: int = 2) -> list[torch.Tensor]:
    """What lies along the last `dims` dimensions, one after the other."""
    return [x] if x.dim() == dims else [m for part in x.unbind() for m in _matrices(part, dims)]
