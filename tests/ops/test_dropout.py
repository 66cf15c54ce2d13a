"""One mask from a seed: every implementation gives the reference's."""

import pytest
import torch
from implementations import Backend

from lora_engine import backends
from lora_engine.backends import launchers
from lora_engine.backends.cpu.dropout import dropout_fwd
from lora_engine.reference.dropout import drop, dropout_mask, philox
from lora_engine.values import WORD, Dropout

OPERATION = "lora_linear"


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((WORD,) * 4, (WORD,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_philox(
    counter: tuple[int, ...], key: tuple[int, int], words: str
) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    assert " ".join(f"{int(word):08x}" for word in philox((c0, c1, c2, c3), key)) == words


SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1]


def mask_of(
    backend: Backend, dropout: Dropout, substream: int, rows: int, cols: int
) -> torch.Tensor:
    """The mask of `lora_linear_dx` whose only share is all ones."""
    dy, weight, ds, lora_a, dx = backend.put(
        torch.zeros(rows, 1),
        torch.zeros(1, cols),
        torch.ones(rows, 1),
        torch.ones(1, cols),
        torch.full((rows, cols), float("nan")),
    )
    spans = [(slice(0, 0), slice(0, 0))] * substream + [(slice(0, 1), slice(0, 1))]
    kernels = launchers.lora_linear(backend.impl)
    kernels.lora_linear_dx(dy, weight, ds, lora_a, dx, spans, dropout)
    return (dx != 0).cpu()


@pytest.mark.parametrize("seed", SEEDS, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_is_the_references(backend: Backend, seed: int, p: float) -> None:
    dropout = Dropout(p, seed)
    mask = mask_of(backend, dropout, seed % 3, 37, 131)
    assert torch.equal(mask, dropout_mask(dropout, seed % 3, 37, 131))


@pytest.mark.parametrize("p", [0.0, 1e-10, 1 - 1e-10], ids=str)
def test_extreme_probabilities(backend: Backend, p: float) -> None:
    mask = mask_of(backend, Dropout(p, 5), 0, 5, 67)
    assert mask.all() if p < 0.5 else not mask.any()


@pytest.mark.parametrize("dtype", backends.DTYPES["cpu"], ids=str)
def test_drop_scales_what_is_kept(isa: str, dtype: torch.dtype, poisoned: None) -> None:
    dropout = Dropout(0.3, 7)
    x = torch.randn(65, 300).to(dtype)
    y = torch.empty_like(x)
    dropout_fwd(x, y, dropout, 1)
    assert torch.equal(y, drop(x, dropout, 1))
    dropout_fwd(x, x, dropout, 1)
    assert torch.equal(y, x)


def test_what_is_dropped_is_zero_even_of_nan(isa: str) -> None:
    dropout = Dropout(0.5, 3)
    x = torch.full((4, 64), float("nan"))
    dropout_fwd(x, x, dropout, 0)
    assert torch.equal(x.isnan(), dropout_mask(dropout, 0, 4, 64))
    assert (x[~x.isnan()] == 0).all()


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_keep_rate(p: float) -> None:
    """Within five standard deviations, of the whole and of every 32nd row and column."""
    mask = dropout_mask(Dropout(p, 11), 0, 512, 512).double()
    assert abs(mask.mean() - (1 - p)) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
    for lines in (mask.mean(0), mask.mean(1)):
        assert (lines - (1 - p)).abs().max() < 5 * (p * (1 - p) / 512) ** 0.5


def test_masks_are_independent() -> None:
    """Of another substream, seed, row or column: equal in half of the places at p = 1/2."""
    mask = dropout_mask(Dropout(0.5, 1), 0, 257, 260)
    others = [
        dropout_mask(Dropout(0.5, 1), 1, 257, 260),
        dropout_mask(Dropout(0.5, 2), 0, 257, 260),
        dropout_mask(Dropout(0.5, 1 + 2**32), 0, 257, 260),
        mask.roll(1, 0),
        *(mask.roll(shift, 1) for shift in (1, 2, 3, 4)),
    ]
    for other in others:
        assert abs((mask == other).double().mean() - 0.5) < 5 * 0.5 / mask.numel() ** 0.5


def test_a_larger_mask_begins_with_the_smaller() -> None:
    dropout = Dropout(0.5, 9)
    assert torch.equal(dropout_mask(dropout, 2, 40, 70)[:7, :13], dropout_mask(dropout, 2, 7, 13))


@pytest.mark.parametrize(("p", "seed"), [(1.0, 0), (-0.1, 0), (float("nan"), 0), (0.1, -1)])
def test_errors(p: float, seed: int) -> None:
    with pytest.raises(ValueError, match=r"dropout: (p|seed)="):
        Dropout(p, seed)
