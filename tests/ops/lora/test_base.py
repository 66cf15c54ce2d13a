"""What a base weight promises to products, of each that there is; and what the dense one adds."""

import pytest
import torch
from base_weights import BASES, kept
from torch import Tensor

from lora_engine.backends import launchers
from lora_engine.ops import BaseWeight, DenseBase, LoraFactors, LoraGroup

OUTS, FEATURES, RANK = (12, 5), 10, 6
WHOLE = torch.randn(sum(OUTS), FEATURES)
KERNELS = launchers.lora_linear("cpu")


def base_of(kind: str, dtype: torch.dtype = torch.float32) -> BaseWeight:
    return BASES[kind]([weight.to(dtype) for weight in WHOLE.split(OUTS)], RANK)


def whole_of(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """W as `base_of` has it."""
    return torch.cat(kept(kind, [weight.to(dtype) for weight in WHOLE.split(OUTS)]))


def filled(base: BaseWeight) -> tuple[LoraGroup, Tensor, Tensor]:
    """A group with an adapter of the second linear, and what A and sB are to be."""
    factors = LoraFactors(torch.randn(RANK, FEATURES), torch.randn(OUTS[1], RANK), 0.5)
    group = LoraGroup(base, [None, factors], capacity=RANK)
    group.fill(KERNELS)
    lora_a = torch.zeros(group.padded_rank, FEATURES)
    lora_b = torch.zeros(sum(OUTS), group.padded_rank)
    lora_a[:RANK], lora_b[OUTS[0] :, :RANK] = factors.lora_a, 0.5 * factors.lora_b
    return group, lora_a, lora_b


every_base = pytest.mark.parametrize("kind", BASES)


@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_are_all_rows_in_order(kind: str, dtype: torch.dtype) -> None:
    base, whole, done = base_of(kind, dtype), whole_of(kind, dtype), 0
    for rows, block in base.blocks():
        assert rows.start == done and torch.equal(block, whole[rows])
        done = rows.stop
    assert done == sum(OUTS)


@every_base
def test_any_rows_can_be_read_and_kept(kind: str) -> None:
    base, whole = base_of(kind), whole_of(kind)
    first, second = base.read(slice(3, 14)), base.read(slice(0, 3))
    assert torch.equal(first, whole[3:14]) and torch.equal(second, whole[:3])


@every_base
def test_augmented_operands_hold_the_factors(kind: str) -> None:
    group, lora_a, lora_b = filled(base_of(kind))
    if not group.base.is_augmentable:
        pytest.skip("a base of blocks alone")
    with group.base.forward_operand(group.placed.lora_b) as operand:
        assert torch.equal(operand.t(), torch.cat((whole_of(kind), lora_b), dim=1))
    with group.base.backward_operand(group.placed.lora_a) as operand:
        assert torch.equal(operand, torch.cat((whole_of(kind), lora_a)))


@every_base
def test_factors_of_other_adapters_leave_nothing_behind(kind: str) -> None:
    group, *_ = filled(base_of(kind))
    other = LoraFactors(torch.randn(2, FEATURES), torch.randn(OUTS[0], 2), 2.0)
    before = group.fill(KERNELS)
    group.set_adapters([other, None])
    group.fill(KERNELS)
    lora_a, lora_b = group.placed.lora_a, group.placed.lora_b
    assert torch.equal(lora_a[:2], other.lora_a) and not lora_a[2:].any()
    assert torch.equal(lora_b[: OUTS[0], :2], 2 * other.lora_b)
    assert not lora_b[:, 2:].any() and not lora_b[OUTS[0] :].any()
    group.fill_again(before, KERNELS)
    assert torch.equal(lora_a[:RANK], before.adapters.blocks[0].factors.lora_a)
    assert not lora_b[: OUTS[0]].any()


@every_base
def test_a_group_says_how_its_products_are_made(kind: str) -> None:
    group, *_ = filled(base_of(kind))
    expected = "augmented" if kind in ("dense", "scratch", "nf4") else "base_add"
    assert group.forward_strategy(64) == group.backward_strategy(64) == expected
    assert group.backward_strategy(64, masked=True) == "base_add"


def test_the_buffer_is_the_weights_and_the_place_of_factors() -> None:
    rank = 8  # 6, in whole 16 bytes of float32
    base = base_of("dense")
    assert isinstance(base, DenseBase)
    assert base.buffer.shape == (sum(OUTS) + rank, FEATURES + rank)


class TestDense:
    def test_weights_are_views_of_the_buffer(self) -> None:
        base = base_of("dense")
        assert isinstance(base, DenseBase)
        for i, expected in enumerate(WHOLE.split(OUTS)):
            assert torch.equal(base.weight(i), expected)
            assert base.weight(i).untyped_storage().data_ptr() == base.buffer.data_ptr()

    @pytest.mark.parametrize("rank", [0, 1, 3, 8, 16])
    def test_rows_start_aligned(self, rank: int) -> None:
        base = DenseBase([torch.randn(24, 32).bfloat16()], rank)
        assert base.buffer.stride(0) * 2 % 16 == 0 and base.factors.lora_a.shape[0] >= rank

    def test_nothing_but_zeros_stands_around_the_weights(self, poisoned: None) -> None:
        base = DenseBase(WHOLE.split(OUTS), RANK)
        assert not base.buffer[:, FEATURES:].any() and not base.buffer[sum(OUTS) :].any()

    def test_weights_that_share_no_input_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\[5, 9\] float32 does not share the input of"):
            DenseBase([torch.randn(12, FEATURES), torch.randn(5, 9)], RANK)
        with pytest.raises(ValueError, match="needs weights"):
            DenseBase([], RANK)
