import pytest

from benchmarks.train.train_flops import (
    ModelShape,
    full_step_flops,
    head_matmuls,
    layer_matmuls,
    step_flops,
)

SHAPE = ModelShape(layers=3, hidden=8, intermediate=20, heads=4, kv_heads=2, head_dim=2, vocab=50)


def flops_of_torch(lengths: list[int], targets: int, rank: int) -> int:
    """The same step counted by torch as it runs, sequence by sequence, attention apart."""
    import peft
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocab,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        attn_implementation="eager",
    )
    assert ModelShape.of(config) == SHAPE
    model = peft.get_peft_model(
        LlamaForCausalLM(config), peft.LoraConfig(r=rank, target_modules="all-linear")
    )
    counter = FlopCounterMode(display=False)
    with counter:
        for i, length in enumerate(lengths):
            hidden = model.base_model.model.model(torch.zeros(1, length, dtype=torch.long))
            supervised = hidden.last_hidden_state[0, : targets if i == 0 else 0]
            model.base_model.model.lm_head(supervised).sum().backward()
    by_operation = counter.get_flop_counts()["Global"]
    return sum(count for op, count in by_operation.items() if "bmm" not in str(op))


def test_linears_lora_and_head_are_what_torch_counts():
    lengths, targets, rank = [7, 4], 3, 2
    attention = SHAPE.layers * sum(
        6 * 2 * SHAPE.heads * SHAPE.head_dim * n * (n + 1) // 2 for n in lengths
    )
    needless = sum(
        (sum(lengths) - targets) * (4 * n * k + 6 * rank * (n + k)) for n, k in SHAPE.mlp
    )
    expected = step_flops(SHAPE, rank, [(0, n) for n in lengths], targets) - attention
    assert expected == flops_of_torch(lengths, targets, rank) - needless


def test_attention_counts_the_causal_half():
    one = step_flops(SHAPE, 1, [(0, 10)], 0)
    two = step_flops(SHAPE, 1, [(0, 5), (0, 5)], 0)
    # 6 products of 2·D operations for each of the 55 or 2·15 pairs that attend.
    assert one - two == SHAPE.layers * 6 * 2 * 8 * (55 - 30)


def test_a_shared_prefix_is_seen_but_not_computed_again():
    whole = step_flops(SHAPE, 1, [(0, 10)], 0)
    assert step_flops(SHAPE, 1, [(0, 6), (6, 4)], 0) == whole


def test_matmuls_of_the_ceiling():
    assert sum(m.flops for m in layer_matmuls(SHAPE, 10)) == sum(
        2 * 2 * 10 * n * k for n, k in [(8, 8), (4, 8), (4, 8), (8, 8), (20, 8), (20, 8), (8, 20)]
    )
    assert sum(m.flops for m in head_matmuls(SHAPE, 6)) == pytest.approx(2 * 2 * 6 * 50 * 8)


def test_training_all_weights_takes_a_third_product_for_each_linear_and_the_head():
    lengths, targets = [7, 4], 11
    pieces = [(0, n) for n in lengths]
    frozen = step_flops(SHAPE, 0, pieces, targets)
    weights = 2 * 11 * (SHAPE.layers * sum(n * k for n, k in SHAPE.linears) + 50 * 8)
    needless = sum(2 * 11 * n * k for n, k in SHAPE.qkv)  # dx of the first layer's, where frozen
    assert full_step_flops(SHAPE, pieces, targets) == frozen + weights + needless
