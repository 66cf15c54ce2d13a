"""A base of packed weights: what it costs, what it shares, and weights that do not go together."""

import threading

import pytest
import torch
from gpu_choices import choices_of_a_gpu
from torch import Tensor

from lora_engine import backends, ops
from lora_engine.backends.plans import DECODED_ROWS
from lora_engine.ops import DenseBase, LoraFactors, LoraGroup, QuantizedBase, quantize_weight


def base_of(*outs: int, features: int = 64, **options: object) -> QuantizedBase:
    weights = [torch.randn(n, features, dtype=torch.bfloat16) for n in outs]
    return QuantizedBase([quantize_weight(weight, **options) for weight in weights])  # type: ignore[arg-type]


def group_of(base: QuantizedBase, rank: int = 4) -> LoraGroup:
    factors = [
        LoraFactors(
            torch.randn(rank, base.in_features, dtype=base.dtype).requires_grad_(),
            torch.randn(n, rank, dtype=base.dtype).requires_grad_(),
            0.5,
        )
        for n in base.out_features
    ]
    return LoraGroup(base, factors)


def test_it_costs_what_the_packed_weights_cost() -> None:
    base = base_of(1024, 512, features=256, double_quant=True)
    assert sum(weight.nbytes for weight in base.weights) < 4.2 / 8 * (1024 + 512) * 256


def test_nothing_decoded_is_kept_for_the_backward_pass() -> None:
    """Saved are the input, S and the factors: nothing as large as the weight."""
    base = base_of(1024, features=256)
    group, x = group_of(base), torch.randn(3, 256, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        (y,) = ops.lora_linear(x, group)
    assert saved
    largest = max(tensor.untyped_storage().nbytes() for tensor in saved)
    assert largest < 1024 * 256 * 2 / 4
    y.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_bases_share_their_scratch() -> None:
    first, second = base_of(64), base_of(32)
    lora_b = torch.zeros(64, 8, dtype=torch.bfloat16)
    with first.forward_operand(lora_b) as operand:
        where = operand.untyped_storage().data_ptr()
    with second.forward_operand(lora_b[:32]) as operand:
        assert operand.untyped_storage().data_ptr() == where
        assert torch.equal(operand[:64].t(), second.weights[0].dequantize())


def test_threads_do_not_share_it() -> None:
    """Products of many threads at once are those of each alone."""
    bases = [base_of(96) for _ in range(4)]
    groups = [group_of(base) for base in bases]
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        alone = [ops.lora_linear(x, group)[0] for group in groups]
        wrong = []

        def run(i: int) -> None:
            with torch.no_grad():
                for _ in range(20):
                    if not torch.equal(ops.lora_linear(x, groups[i])[0], alone[i]):
                        wrong.append(i)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(groups))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_training_after_inference_mode() -> None:
    """In a thread of its own, whose scratch memory is first asked for in inference mode."""
    group, x = group_of(base_of(96)), torch.randn(32, 64, dtype=torch.bfloat16)
    found: list[tuple[Tensor, Tensor]] = []

    def run() -> None:
        with torch.inference_mode():
            (inferred,) = ops.lora_linear(x, group)
        (y,) = ops.lora_linear(x, group)
        y.sum().backward()
        found.append((inferred, y.detach()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found) == 1 and torch.equal(*found[0])


def test_blocks_of_a_tall_weight() -> None:
    base = base_of(DECODED_ROWS + 5, 40, features=32)
    whole = torch.cat([weight.dequantize() for weight in base.weights])
    sizes = []
    for rows, block in base.blocks():
        assert torch.equal(block, whole[rows])
        sizes.append(len(block))
    assert sizes == [DECODED_ROWS, 45]
    assert torch.equal(base.read(slice(1000, 1040)), whole[1000:1040])


@pytest.mark.parametrize("dropout", [None, ops.Dropout(0.3, 2**40 + 7)], ids=["whole", "masked"])
def test_what_runs_on_a_gpu(dropout: ops.Dropout | None) -> None:
    """Triton's kernels decode straight into the operand, or into the one block that is masked."""
    if not backends.triton_interpreted():
        pytest.skip("triton is not installed, or compiles for the GPU in this process")
    torch.manual_seed(0)
    base = base_of(48, 24, features=96, double_quant=True)
    dense = DenseBase([weight.dequantize() for weight in base.weights], 8)
    group = group_of(base)
    x = torch.randn(17, 96, dtype=torch.bfloat16, requires_grad=True)
    results = []
    with choices_of_a_gpu():
        assert backends.select("blockwise_4bit", x.device, x.dtype) == "triton"
        factors = [block.factors for block in group.adapters.blocks]
        for each in (group, LoraGroup(dense, factors)):
            y = torch.cat(ops.lora_linear(x, each, dropout=dropout), dim=-1)
            leaves = [x, *(t for t in group.tensors() if t is not None)]
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.gpu
def test_a_gpu_decodes_without_waiting_in_the_memory_of_one_operand() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gpu = torch.device("cuda", 0)
    weights = [torch.randn(n, 1024, dtype=torch.bfloat16, device=gpu) for n in (2048, 1024, 2048)]
    bases = [QuantizedBase([quantize_weight(weight, double_quant=True)]) for weight in weights]
    lora_b = torch.zeros(2048, 16, dtype=torch.bfloat16, device=gpu)

    def decode(base: QuantizedBase) -> int:
        with base.forward_operand(lora_b[: base.out_features[0]]) as operand:
            return operand.nbytes

    largest = max(map(decode, bases))  # which compiles the kernel
    before = torch.cuda.memory_allocated(gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for base in bases:
            decode(base)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated(gpu) == before
    assert torch.cuda.max_memory_allocated(gpu) - before < 1.1 * largest


def test_weights_that_do_not_go_together_are_refused() -> None:
    first = quantize_weight(torch.randn(4, 64))
    others = [
        quantize_weight(torch.randn(4, 32)),
        quantize_weight(torch.randn(4, 64), "fp4"),
        quantize_weight(torch.randn(4, 64).bfloat16()),
    ]
    for other in others:
        with pytest.raises(ValueError, match="does not share"):
            QuantizedBase([first, other])
    with pytest.raises(ValueError, match="needs weights"):
        QuantizedBase([])


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_equals_that_over_the_weights_decoded_once(
    dtype: torch.dtype, format: str, nested: bool
) -> None:
    """Loss and all gradients over several steps, bit for bit: the products are the same."""
    torch.manual_seed(0)
    weights = [torch.randn(48, 96).to(dtype), torch.randn(24, 96).to(dtype)]
    packed = [quantize_weight(weight, format, double_quant=nested) for weight in weights]
    x, target = torch.randn(17, 96).to(dtype).requires_grad_(), torch.randn(17, 72).to(dtype)
    runs = []
    for base in (QuantizedBase(packed), None):
        torch.manual_seed(1)
        leaves = [
            (torch.randn(4, 96).to(dtype).requires_grad_(), torch.zeros(n, 4).to(dtype))
            for n in (48, 24)
        ]
        factors = [LoraFactors(a, b.requires_grad_(), 0.5) for a, b in leaves]
        group = (
            LoraGroup.dense([weight.dequantize() for weight in packed], factors)
            if base is None
            else LoraGroup(base, factors)
        )
        trained = [tensor for pair in leaves for tensor in pair]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        history = []
        for _ in range(3):
            y = torch.cat(ops.lora_linear(x, group), -1)
            loss = torch.nn.functional.mse_loss(y, target)
            loss.backward()
            history += [
                loss.detach(),
                *(t.grad.clone() for t in [x, *trained] if t.grad is not None),
            ]
            optimizer.step()
            optimizer.zero_grad()
            x.grad = None
        runs.append(history)
    for ours, dense in zip(*runs, strict=True):
        assert torch.equal(ours, dense)
