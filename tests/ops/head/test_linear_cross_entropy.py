import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_cases import EXTRAS, case, leaf, ours, peer, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Backend
from oracle import check
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_engine import ops
from lora_engine.errors import UserError
from lora_engine.ops import linear_cross_entropy as function

OPERATION = "linear_cross_entropy"


def skip_where_products_are_not_exact(backend: Backend, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and backend.device.type == "cpu":
        pytest.skip("float16 products on a CPU are not what a GPU does")


@pytest.mark.reference
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("rows,classes", [(1, 5), (14, 1000), (26, 97)], ids=str)
def test_matches_oracle(
    backend: Backend,
    dtype: torch.dtype,
    poisoned: None,
    reduction: str,
    rows: int,
    classes: int,
) -> None:
    skip_where_products_are_not_exact(backend, dtype)
    target, *inputs = backend.put(targets(rows, classes), *case(rows, classes, dtype, ""))
    check(ours(target, reduction, backend.impl, chunk_rows=12), peer(target, reduction), inputs)


@pytest.mark.reference
@pytest.mark.parametrize("chunk_rows", [4, 40], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("parts", ["bias", "lora", "bias+lora"])
def test_heads_with_more_parts_match_oracle(
    backend: Backend,
    dtype: torch.dtype,
    poisoned: None,
    parts: str,
    reduction: str,
    chunk_rows: int,
) -> None:
    skip_where_products_are_not_exact(backend, dtype)
    target, *inputs = backend.put(targets(11, 97), *case(11, 97, dtype, parts))
    run = ours(target, reduction, backend.impl, chunk_rows=chunk_rows, **EXTRAS)
    check(run, peer(target, reduction, **EXTRAS), inputs)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "extras"])
def test_gradcheck(impl: str, reduction: str, extras: dict[str, Any]) -> None:
    inputs = [x.requires_grad_() for x in case(4, 5, torch.float64, "bias+lora", width=3)]
    target = torch.tensor([0, 4, -100, 3])
    run = ours(target, reduction, impl, chunk_rows=2, **extras)
    assert torch.autograd.gradcheck(run, inputs)


def test_mixed_dtypes_of_adapters(backend: Backend) -> None:
    """PEFT keeps adapters in float32 under a bfloat16 model; their gradients are float32 too."""
    target, *inputs = backend.put(targets(26, 97), *case(26, 97, torch.bfloat16, "lora"))
    inputs = [leaf(x if i < 2 else x.float()) for i, x in enumerate(inputs)]
    run = ours(target, "mean", backend.impl, chunk_rows=9)
    grads = torch.autograd.grad(run(*inputs), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    oracle = torch.autograd.grad(peer(target, "mean")(*exact), exact)
    for x, grad, expected in zip(inputs, grads, oracle, strict=True):
        assert grad.dtype == x.dtype
        assert (grad - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_chunks_of_a_trained_head_lose_nothing(isa: str, reduction: str) -> None:
    """64 chunks summed in bfloat16 would be wrong by several per cent."""
    target, inputs = targets(256, 40), case(256, 40, torch.bfloat16, "bias+lora")
    whole, parts = (
        torch.autograd.grad(
            ours(target, reduction, chunk_rows=rows)(*(leaves := [*map(leaf, inputs)])), leaves
        )
        for rows in (256, 4)
    )
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).abs().max() <= 8e-3 * a.abs().max()


def test_expanded_and_repeated_upstream_gradients(backend: Backend) -> None:
    target, *inputs = backend.put(targets(26, 97), *case(26, 97, torch.float32, "lora"))
    inputs = [leaf(x) for x in inputs]
    loss = ours(target, "none", backend.impl, chunk_rows=9)(*inputs)
    first = torch.autograd.grad(loss.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(loss.sum() * 2, inputs)
    summed = torch.autograd.grad(ours(target, "sum", backend.impl, chunk_rows=9)(*inputs), inputs)
    for a, b, c in zip(first, second, summed, strict=True):
        assert torch.equal(2 * a, b)
        assert torch.allclose(a, c, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight = (leaf(x) for x in case(5, 7, torch.float32, ""))
    loss = function(hidden, weight, torch.arange(5)).loss.square()
    with pytest.raises(UserError, match="no second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_tied_embedding_gets_both_gradients(backend: Backend) -> None:
    ids, target = torch.randint(0, 30, (2, 12), device=backend.device)
    weight, mixing = backend.put(torch.randn(30, 8), torch.randn(8, 8))
    weight.requires_grad_()
    grads = []
    for run in (ours(target, "mean", backend.impl, chunk_rows=5), peer(target, "mean")):
        grads += torch.autograd.grad(run(F.embedding(ids, weight) @ mixing, weight), weight)
    assert torch.allclose(*grads, atol=1e-6)


@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "extras"])
@pytest.mark.reference
def test_reports_logprobs_correctness_and_entropy(backend: Backend, extras: dict[str, Any]) -> None:
    impl = backend.impl
    hidden, weight = backend.put(torch.randn(40, 16), torch.randn(30, 16))
    logits = hidden @ weight.T
    target = torch.randint(0, 30, (40,), device=backend.device)
    target[:20] = logits.argmax(-1)[:20]
    target[5] = -100
    out = function(
        hidden.requires_grad_(), weight, target, chunk_rows=7, entropy=True, impl=impl, **extras
    )
    assert torch.equal(out.correct, (logits.argmax(-1) == target) & (target != -100))
    if extras:
        logits = 6.0 * torch.tanh(logits / 6.0)
    logp = logits.log_softmax(-1)
    expected = logp.gather(1, target.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    expected[5] = entropy[5] = 0
    assert out.entropy is not None and out.mean_logit is None
    assert torch.allclose(out.logprobs, expected, atol=1e-5)
    assert torch.allclose(out.entropy, entropy, atol=1e-5)
    assert out.entropy.requires_grad and not out.logprobs.requires_grad
    mean = logits.mean(-1)
    mean[5] = 0
    means = function(hidden, weight, target, chunk_rows=7, mean_logit=True, impl=impl, **extras)
    assert means.mean_logit is not None and not means.mean_logit.requires_grad
    assert torch.allclose(means.mean_logit, mean, atol=1e-5)
    assert function(hidden, weight, target, impl=impl).entropy is None


@pytest.mark.reference
@pytest.mark.parametrize("parts", ["", "bias+lora"])
def test_temperature_divides_the_logits(backend: Backend, poisoned: None, parts: str) -> None:
    target, *inputs = backend.put(targets(14, 97), *case(14, 97, torch.float32, parts))

    def theirs(hidden: Tensor, *rest: Tensor) -> Tensor:
        bias = (rest[1] / 0.7,) if parts else ()
        return peer(target, "none")(hidden / 0.7, rest[0], *bias, *rest[2:])

    check(ours(target, "none", backend.impl, temperature=0.7), theirs, inputs)


def test_temperature_is_positive_and_without_a_softcap() -> None:
    hidden, weight = torch.randn(2, 4), torch.randn(5, 4)
    for options in ({"temperature": 0.0}, {"temperature": 0.5, "softcap": 3.0}):
        with pytest.raises(ValueError, match="temperature"):
            function(hidden, weight, torch.arange(2), **options)


@pytest.mark.reference
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_nothing_supervised_is_zero_with_zero_gradient(
    backend: Backend, poisoned: None, reduction: str
) -> None:
    for rows in (0, 3):
        inputs = [leaf(x) for x in backend.put(*case(rows, 9, torch.float32, "bias+lora"))]
        (target,) = backend.put(torch.full((rows,), -100))
        loss = ours(target, reduction, backend.impl, **EXTRAS)(*inputs)
        grads = torch.autograd.grad(loss.sum(), inputs)
        assert not loss.any() and not any(grad.any() for grad in grads)


def test_no_gradient_is_made_when_none_is_wanted() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)
    with torch.no_grad():
        loss = function(hidden, weight, torch.arange(4)).loss
    assert not loss.requires_grad


def test_results_do_not_keep_themselves_alive() -> None:
    for reduction in ("none", "mean"):
        inputs = [leaf(x) for x in case(5, 7, torch.float32, "lora")]
        loss = ours(torch.arange(5), reduction)(*inputs)
        node = weakref.ref(loss.grad_fn)
        del loss
        assert node() is None


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.note(x.untyped_storage(), given)
        return out

    def note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or key in given:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    "impl,reduction,parts",
    [
        ("cpu", "none", ""),
        ("cpu", "mean", ""),
        ("cpu", "none", "bias+lora"),
        ("cpu", "sum", "bias+lora"),
        ("reference", "mean", ""),  # that the limit can be exceeded
    ],
)
def test_extra_memory_is_one_chunk(impl: str, reduction: str, parts: str) -> None:
    """Logits of all rows would be 5 MB, a chunk of 32 rows is 0.3 MB."""
    rows, classes, width, chunk = 512, 2500, 8, 32
    inputs = [leaf(x) for x in case(rows, classes, torch.float32, parts, width)]
    target = targets(rows, classes)
    frozen = [inputs[0], inputs[1].detach(), *inputs[2:]]
    with LiveBytes() as live:
        ours(target, reduction, impl, chunk_rows=chunk, **EXTRAS)(*frozen).sum().backward()
    heads = sum(x.nbytes for x in inputs[2:])
    limit = chunk * classes * 4 * 1.02 + 6 * rows * width * 4 + 6 * heads
    assert (live.peak <= limit) == (impl == "cpu"), (live.peak, limit)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40),
    classes=st.integers(1, 60),
    chunk=st.integers(1, 50),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    parts=st.sampled_from(["", "bias", "lora", "bias+lora"]),
    trained=st.integers(0, 31),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    softcap=st.sampled_from([None, 3.0]),
    z_loss=st.sampled_from([0.0, 1e-3]),
)
def test_chunks_and_what_is_trained_do_not_matter(
    rows: int,
    classes: int,
    chunk: int,
    reduction: str,
    parts: str,
    trained: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
) -> None:
    extras = {"label_smoothing": label_smoothing, "softcap": softcap, "z_loss": z_loss}
    target = targets(rows, classes)
    inputs = case(rows, classes, torch.float64, parts, width=6)
    results = []
    for run in (
        ours(target, reduction, "cpu", chunk_rows=chunk, **extras),
        ours(target, reduction, "reference", **extras),
    ):
        leaves = [x.clone().requires_grad_(bool(trained >> i & 1)) for i, x in enumerate(inputs)]
        loss = run(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        dy = torch.arange(1.0, loss.numel() + 1, dtype=torch.float64).view(loss.shape)
        grads = torch.autograd.grad(loss, wanted, dy) if wanted else ()
        results.append([loss.detach(), *grads])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_errors_name_what_does_not_fit() -> None:
    hidden, weight, target = torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"hidden \[3, 4\] float32 does not fit weight \[9, 5\]"):
        function(hidden, torch.randn(9, 5), target)
    with pytest.raises(ValueError, match=r"target \[2\] int64 is not \[3\] int64"):
        function(hidden, weight, target[:2])
    with pytest.raises(ValueError, match="reduction='total'"):
        function(hidden, weight, target, reduction="total")
    with pytest.raises(ValueError, match="differ in dtype"):
        function(hidden.bfloat16(), weight, target)
    with pytest.raises(ValueError, match=r"bias \[8\] float32 does not fit"):
        function(hidden, weight, target, bias=torch.randn(8))
    with pytest.raises(ValueError, match=r"lora_b \[8, 2\] float32 do not fit"):
        lora = ops.LoraFactors(torch.randn(2, 4), torch.randn(8, 2), 1.0)
        function(hidden, weight, target, lora=lora)
    with pytest.raises(ValueError, match="chunk_rows=0"):
        function(hidden, weight, target, chunk_rows=0)
    with pytest.raises(ValueError, match="softcap=-1"):
        function(hidden, weight, target, softcap=-1.0)
